"""LoRA adapters in peft's layout: adapter_config.json and adapter_model.safetensors."""
import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.console import UserError, one_line
from support.files import ADAPTER, read_json

# The linear layers of a block, by their names in Hugging Face's layout.
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # peft's, before a layer's name in its base

# Settings that would need another computation, and the values under which they do not.
PLAIN = {"peft_type": ("LORA",), "bias": ("none", None), "use_dora": (False, None),
         "lora_bias": (False, None), "fan_in_fan_out": (False, None), "rank_pattern": ({}, None),
         "alpha_pattern": ({}, None), "modules_to_save": (None, []),
         "trainable_token_indices": (None, []), "target_parameters": (None, [])}


def read(folder, base, sizes):
    """(scale, {layer, by its name in the base: (A [r, in], B [rows, r])}). Raises UserError.

    base: the base's folder, for errors. sizes: {a layer of it: (inputs, rows)}.
    """
    config = read_json(folder / ADAPTER)
    for key, values in PLAIN.items():
        if config.get(key, values[0]) not in values:
            raise UserError(f"{folder / ADAPTER}: {key} = {config[key]!r} is not supported (only "
                            f"{values[0]!r})")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float):
        raise UserError(f"{folder / ADAPTER}: r and lora_alpha are not both numbers above zero")
    scale = alpha / (rank ** 0.5 if config.get("use_rslora") else rank)
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / WEIGHTS}: missing, cut short, or not safetensors "
                        f"({one_line(error)})") from None
    sides = {"A": {}, "B": {}}
    for name, tensor in tensors.items():
        parts = re.fullmatch(rf"{re.escape(PREFIX)}(.*)\.lora_([AB])\.weight", name)
        if not parts or tensor.dim() != 2 or tensor.shape[parts[2] == "B"] != rank:
            raise UserError(f"{folder}: {name} {list(tensor.shape)} is no part of an adapter of "
                            f"rank {rank}")
        sides[parts[2]][parts[1]] = tensor
    alone = sides["A"].keys() ^ sides["B"].keys()
    if alone or not tensors:
        raise UserError(f"{folder}: {min(alone, default='no layer')} has not both of A and B")
    for name, A in sides["A"].items():
        found, there = (A.shape[1], len(sides["B"][name])), sizes.get(name, "no such layer")
        if found != there:
            raise UserError(f"{folder}: this adapter is of another base: its {name} has (inputs, "
                            f"rows) {found}; in {base} there is {there}")
    return scale, {name: (A, sides["B"][name]) for name, A in sides["A"].items()}


def write(folder, base, settings, adapters):
    """Write a folder that peft opens. Raises UserError where that cannot be done.

    base: the folder of the model that it belongs to. settings: r, lora_alpha, target_modules.
    adapters: {layer, by its name in the base: (A, B)}.
    """
    tensors = {f"{PREFIX}{name}.lora_{side}.weight": matrix.contiguous()
               for name, both in adapters.items() for side, matrix in zip("AB", both)}
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "lora_dropout": 0.0,
              "base_model_name_or_path": str(Path(base).resolve()), "inference_mode": True}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / ADAPTER).write_text(json.dumps(config | settings, indent=2) + "\n",
                                     encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written ({one_line(error)})") from None
