"""Every kernel is compiled to a Hopper GPU's machine code, which needs no GPU; the interpreter takes more than the compiler."""

import os
import subprocess
import sys

from tests.triton_kernels import needs_triton

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_sft.kernels import adam_triton, loss_triton, rope_triton

FLOATS = {"softcap", "eps", "step_size", "root_correction", "beta1", "rest1", "beta2", "rest2", "decay"}
WHOLE = {"stride", "rows", "count", "tokens", "table_token", "table_row"}
NARROW = {"products", "mixed", "table", "query", "key", "query_weight", "key_weight", "grad_query", "grad_key", "grad_value"}
NARROW |= {"grad_mixed", "gradient", "first", "second", "copy"}


def kind(name, narrow):
    if name in FLOATS | WHOLE:
        return "fp32" if name in FLOATS else "i32"
    return "*i64" if name == "targets" else narrow if name in NARROW else "*fp32"


def compiled(kernel, narrow, **constants):
    signature = {name: "constexpr" if name in constants else kind(name, narrow) for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert len(code.asm["cubin"]) > 1000
    print(kernel.__name__, narrow, code.metadata.shared, flush=True)


heads = dict(GROUPS=2, SLOTS=4, DIM=128, HALF=64, WIDTH=64, TOKENS=rope_triton.TOKENS)
for on, narrow in ((False, "*fp32"), (True, "*bf16")):
    compiled(loss_triton._sums, narrow, CAPPED=on, TOTAL=on, COLUMNS=loss_triton.COLUMNS)
    flags = dict(ON_PROBABILITY=on, ON_LABEL=on, ON_ALL=on)
    compiled(loss_triton._gradient, narrow, CAPPED=on, **flags, COLUMNS=loss_triton.COLUMNS)
    compiled(rope_triton._forward, narrow, NORMED=on, **heads)
    compiled(rope_triton._backward, narrow, NORMED=on, **heads)
    compiled(adam_triton._update, narrow, DECOUPLED=on, COPIES=on, ELEMENTS=adam_triton.ELEMENTS)
"""


@needs_triton
def test_every_kernel_is_compiled_for_hopper(tmp_path):
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == 10
