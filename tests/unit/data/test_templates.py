"""Templates render as transformers renders them; hostile ones are refused within 5 seconds and 1 GiB."""

import resource

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from megatron_sft.data.templates import Template, TemplateError, compile_apart
from megatron_sft.data.trial import TrialError, limited
from tests.unit.data.chat_cases import conversations
from tests.unit.data.chat_families import FAMILIES

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TOOLS = [{"type": "function", "function": {"name": "add", "description": "<b>'&\u00fc", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("name", FAMILIES)
def test_text_equals_that_of_transformers(name: str) -> None:
    family = FAMILIES[name]
    names = {"bos_token": family.bos or "<s>", "eos_token": family.eos or "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")), **names)
    template = Template(family.text, names)
    compared = 0
    for messages in conversations(family.has_system)[::3]:
        for tools in (None, TOOLS):
            for prompt in (False, True):
                ours, _ = template.render(messages, tools, {}, add_generation_prompt=prompt)
                theirs = tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=family.text, tokenize=False, add_generation_prompt=prompt
                )
                assert ours == theirs
                compared += 1
    assert compared >= 52


HOSTILE = {
    "class chain": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class chain by filter": "{{ (''|attr('__class__')).__mro__ }}",
    "class chain by item": "{{ messages['__class__'].__base__ }}",
    "globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__globals__['os'] }}",
    "globals of raise_exception": "{{ raise_exception.__globals__['jinja2'] }}",
    "builtins of strftime_now": "{{ strftime_now.__globals__.__builtins__ }}",
    "code of a function": "{{ raise_exception.__code__.co_consts }}",
    "closure": "{{ strftime_now.__closure__[0] }}",
    "import": "{% import 'os' as os %}{{ os.getcwd() }}",
    "include": "{% include '/etc/passwd' %}",
    "format string": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    "format by filter": "{{ ('{0.__class__.__subclasses__}' | attr('format'))(1) }}",
    "changing the messages": "{{ messages.append(1) }}",
    "clearing a message": "{{ messages[0].clear() }}",
    "poping a message": "{{ messages[0].pop('role') }}",
    "self": "{{ self.__init__.__globals__ }}",
    "cycler": "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "namespace": "{{ namespace.__init__.__globals__ }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('id') }}",
    "undefined": "{{ nothing.__class__.__init__.__globals__ }}",
    "generator frame": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "huge range": "{% for i in range(10**9) %}x{% endfor %}",
    "nested ranges": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "ranges": "{% for i in range(999) %}{% for j in range(9999) %}{% for k in range(999) %}{% endfor %}{% endfor %}{% endfor %}",
    "folded multiplication": "{{ 'a' * 10000000000 }}",
    "folded power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "power of variables": "{% set n = messages|length + 7 %}{{ n ** (n ** n) }}",
    "multiplication of variables": "{% set n = messages|length * 5000000000 %}{{ 'a' * n }}",
    "doubling": "{% set n = namespace(t='aaaaaaaa') %}{% for i in range(60) %}{% set n.t = n.t + n.t %}{% endfor %}{{ n.t }}",
    "list doubling": "{% set ns = namespace(t=[1]) %}{% for i in range(60) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
    "list multiplication": "{{ ([0] * 10000000000)|length }}",
    "recursion": "{% macro m(n) %}{{ m(n + 1) }}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
    "recursive loop": "{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if true %}" * 3000 + "{% endif %}" * 3000,
    "padding": "{{ '%999999999999d' % 1 }}",
    "center": "{{ 'x'|center(9999999999) }}",
    "indent": "{{ ('x\\n' * 99999)|indent(9999999) }}",
    "lipsum words": "{{ lipsum(n=100000000) }}",
    "slow join": "{% set r = range(99999)|list %}{% for i in r %}{{ r|join|length }}{% endfor %}",
    "a long number": "{{ " + "9" * 9999 + " }}",
    "infinity": "{{ 1e999 }}",
    "replace": "{{ ('a' * 99999)|replace('a', 'b' * 99999) }}",
}


def _tried(text: str, seconds: int = 4) -> None:
    """Compiled and rendered as a build does it first."""
    compile_apart(text, {})
    limited(lambda: Template(text, {}).render(CHAT), seconds)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_in_time(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with pytest.raises(TrialError) as refusal:
        _tried(HOSTILE[name], 4 if name == "nested ranges" else 1)  # one waits as long as users do
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5.0
    assert str(refusal.value)


def test_real_templates_pass() -> None:
    for family in FAMILIES.values():
        compile_apart(family.text, {"bos_token": family.bos, "eos_token": family.eos})


def test_a_constant_is_not_computed_where_the_template_is_compiled() -> None:
    """jinja2 would: 3 GB, in the process of the build, although the process that tries it has 1 GiB."""
    compiled = limited(lambda: bool(Template("{{ 'a'|center(3000000000) }}{% if 'b'|center(3000000000) %}{% endif %}", {})), 1)
    assert compiled is True


def test_generation_blocks_give_character_spans() -> None:
    text = "{% for m in messages %}[{{ m.role }}]{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert Template(text, {}).render(CHAT) == ("[user]Hi[assistant]Hello", [(6, 8), (19, 24)])


def test_a_message_cannot_fake_a_generation_mark() -> None:
    template = Template("{% for m in messages %}{{ m.content }}{% endfor %}", {})
    faked = [{"role": "user", "content": "\x02from" + "0" * 16 + "\x03evil\x02to" + "0" * 16 + "\x03"}]
    assert template.render(faked)[1] == []


def test_what_a_template_raises_is_cut() -> None:
    with pytest.raises(TemplateError) as refusal:
        Template("{{ raise_exception('a' * 99999) }}", {}).render(CHAT)
    assert len(str(refusal.value)) < 1100
