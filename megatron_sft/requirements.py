"""The packages that this one needs, without torch: python3 -m megatron_sft.requirements > requirements.txt

For machines whose torch is a vendor's build that pip must not replace (docs/containers.md). Needs the installed package.
"""

from importlib import metadata

VENDORS = ("torch",)
"""Left out."""


def requirements() -> list[str]:
    """One line a package, as setup.py has it."""
    listed = metadata.requires("megatron-sft") or []
    needed = [line for line in listed if "extra ==" not in line]
    return [line for line in needed if not any(line == name or line.startswith((f"{name}<", f"{name}>")) for name in VENDORS)]


if __name__ == "__main__":
    print("\n".join(requirements()))
