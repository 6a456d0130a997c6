"""Model folders in Hugging Face layout, and the hub."""
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from support.console import UserError, one_line, specs

ADAPTER = "adapter_config.json"  # a folder that has it, and no config.json, is an adapter's (peft)
MAX_FILE = 2**28  # bytes of a JSON file: far above any real one
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json",
                   "chat_template.jinja", "generation_config.json", "special_tokens_map.json",
                   "added_tokens.json")
# Classes that transformers 5 builds anew, without tokenizer.json's normalizer and pre-tokenizer.
BUILT_ANEW = ("LlamaTokenizer", "LlamaTokenizerFast", "GPT2Tokenizer", "GPT2TokenizerFast")


def read_json(path):
    """The dict in a JSON file. Raises UserError if it is missing, too large, or no JSON object."""
    path = Path(path)
    try:
        if path.stat().st_size > MAX_FILE:
            raise ValueError("the file is too large")
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # a byte order mark does no harm
        if not isinstance(value, dict):
            raise ValueError("an object was expected")
        return value
    except FileNotFoundError:
        raise UserError(f"{path.parent}: {path.name} is missing") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({one_line(error)})") from None


# --------------------------------------------------------------------------------------------------
# Model folders

def is_hub_name(name):
    """Is this a name on the hub, org/model or org/model@revision, and not a path here?"""
    fits = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", str(name))
    return bool(fits) and not Path(name).exists() and not Path(name).parent.is_dir()


def reward_models(rewards):
    """Those of --reward that name a reward model: a folder or a hub name."""
    return [spec for spec, _ in specs(rewards)
            if ":" not in spec and (Path(spec).is_dir() or is_hub_name(spec))]


def find(name, patterns=("*.json", "*.jinja", "*.safetensors", "tokenizer.model")):
    """The folder of a model: a local folder as it is, a hub name fetched into the hub's cache.

    patterns: which files to fetch. Raises UserError where there is no such model.
    The folder of an adapter stands for its base.
    """
    name = base_of(name)
    if Path(name).is_dir():
        return Path(name)
    if not is_hub_name(name):
        raise UserError(f"{name}: no such model folder")
    return fetch(str(name), list(patterns))


def adapter_of(name):
    """The folder of an adapter, or None where `name` is none: a model's folder, a hub name."""
    folder = Path(name)
    alone = (folder / ADAPTER).is_file() and not (folder / "config.json").is_file()
    return folder if alone else None


def base_of(name):
    """The name of the model that an adapter's folder belongs to. Any other name as it is.

    Raises UserError where the folder does not say it.
    """
    folder = adapter_of(name)
    if folder is None:
        return name
    base = read_json(folder / ADAPTER).get("base_model_name_or_path")
    if not isinstance(base, str) or not base or adapter_of(base):
        raise UserError(f"{folder / ADAPTER}: base_model_name_or_path names no model")
    return base


def fetch(name, patterns, kind="model"):
    """The folder of a hub model or dataset (kind), "org/name" or "org/name@revision".

    It is downloaded once and then comes from the hub library's cache. A download that broke off
    goes on where it stopped. Raises UserError with what to do.
    """
    from huggingface_hub import errors, snapshot_download  # only for who names a hub model
    name, _, revision = name.partition("@")
    here = "folder" if kind == "model" else "file"
    try:
        return Path(snapshot_download(name, repo_type=kind, revision=revision or None,
                                      allow_patterns=patterns, ignore_patterns=["consolidated*"]))
    except errors.HFValidationError as error:
        raise UserError(f"{name}: the hub does not allow such a name ({one_line(error)})") from None
    except errors.GatedRepoError:
        raise UserError(f"{name}: its authors ask you to accept their terms first: do so on its "
                        "page of the hub, then `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"{name}: the hub has no revision {revision!r} of it") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{name}: no such {here} here, and no such {kind} on the hub "
                        "(or it is private: `hf auth login`)") from None
    except (errors.HTTPError, OSError) as error:  # no network, or a download that broke off
        raise UserError(f"{name}: no such {here} here, and the hub cannot be reached "
                        f"({one_line(error)}); offline, name a local {here} instead") from None


def config_settings(raw, families):
    """What model.Config needs of a config.json's dict. Raises UserError.

    families: {model_type that our decoder can compute: what it takes for keys that are left out}.
    """
    supported = {"hidden_act": ("silu", "swish"), "attention_bias": (False, None),
                 "mlp_bias": (False, None), "quantization_config": (None,)}
    check_config(raw, families, supported)
    family = raw["model_type"]
    raw = families[family] | raw
    # transformers 5 writes base and scaling into rope_parameters. What stands there wins.
    scaling = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    theta = scaling.get("rope_theta") or raw.get("rope_theta") or 10000.0
    scaling = {"original_max_position_embeddings": raw.get("max_position_embeddings")} | scaling
    llama3 = scaling.get("rope_type", scaling.get("type")) == "llama3"
    keys = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads")
    try:
        heads, architectures = raw["num_attention_heads"], raw.get("architectures") or []
        return {key: raw[key] for key in sizes} | {
            "num_key_value_heads": raw.get("num_key_value_heads") or heads,
            "head_dim": raw.get("head_dim") or raw["hidden_size"] // heads,
            "max_position_embeddings": raw.get("max_position_embeddings", 2048),
            "rms_norm_eps": float(raw.get("rms_norm_eps", 1e-6)),  # transformers' default
            "rope_theta": float(theta),
            "rope_scaling": {key: float(scaling[key]) for key in keys} if llama3 else None,
            "tie_word_embeddings": raw.get("tie_word_embeddings", False),
            "qkv_bias": family == "qwen2",
            "qk_norm": family == "qwen3",
            "score_head": any("SequenceClassification" in str(name) for name in architectures),
            "sliding_window": raw.get("sliding_window") if slides(raw) else None,
        }
    except KeyError as missing:
        raise UserError(f"config.json lacks {missing}") from None
    except (TypeError, ValueError, ZeroDivisionError):
        raise UserError("config.json: a setting is not a usable number") from None


def slides(raw):
    """Has a layer a sliding window, by a config.json? All of Mistral's have, some of Qwen's may."""
    if raw["model_type"] in ("llama", "mistral"):
        return raw["model_type"] == "mistral"
    some = raw["num_hidden_layers"] > raw.get("max_window_layers", 28)
    if raw.get("layer_types"):
        some = "sliding_attention" in raw["layer_types"]
    return bool(raw.get("use_sliding_window")) and some


def check_config(raw, families, supported):
    """Raise UserError for a config.json's dict that our decoder would compute wrongly.

    families: values of model_type that it can compute. supported: {key: the values allowed}.
    """
    if raw.get("model_type") not in list(families):
        raise UserError(f"model_type {raw.get('model_type')!r} is not supported; "
                        f"these are: {', '.join(families)}")
    for key, values in supported.items():
        if key == "attention_bias" and raw["model_type"] == "qwen2":
            continue  # it does not read this key
        if raw.get(key, values[0]) not in values:
            raise UserError(f"config.json: {key} = {raw[key]!r} is not supported (only "
                            f"{values[0]!r})")
    rope = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or rope
    if not isinstance(scaling, dict) or not isinstance(rope, dict):
        raise UserError("config.json: rope_scaling is not an object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise UserError(f"config.json: rope scaling {kind!r} is not supported (only 'llama3')")


def check_sizes(config):
    """Raise UserError if a config's sizes are not whole numbers in their range, or do not fit."""
    largest = {"vocab_size": 2**24, "hidden_size": 2**24, "intermediate_size": 2**24,
               "num_hidden_layers": 2**10, "num_attention_heads": 2**24,
               "num_key_value_heads": 2**24, "head_dim": 2**24, "max_position_embeddings": 2**21}
    if config.sliding_window is not None:
        largest["sliding_window"] = 2**24
    bad = [key for key, most in largest.items()
           if type(getattr(config, key)) is not int or not 1 <= getattr(config, key) <= most]
    if bad or config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise UserError("config.json: sizes do not fit each other "
                        f"(look at {', '.join(bad) or 'the heads'})")


def read_tensors(folder):
    """All tensors of a folder's model.safetensors, or of the files that its index names."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str)
                                                       for file in weight_map.values()):
            raise UserError(f"{index}: no weight_map from tensors to files")
        names = sorted(set(weight_map.values()))
    tensors = {}
    for name in names:
        # os.path.isfile takes any text at all; Path.is_file may raise.
        if Path(name).name != name or not os.path.isfile(folder / name):
            raise UserError(f"{folder}: {one_line(name)} is missing")
        try:
            with safe_open(folder / name, "pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}
        except SafetensorError as error:
            raise UserError(f"{folder / name}: cut short, or not safetensors "
                            f"({one_line(error)})") from None
    return tensors


def stack(folder, tensors, names, shapes):
    """{our name: tensor}: the tensors of a folder under our names, stacked where we join several.

    names: {our name: {name in the file: ..}}. shapes: {our name: shape}. folder: for errors.
    Raises UserError for a tensor that is missing, of another shape, or unknown.
    """
    weights, used = {}, set()
    for ours, parts in names.items():
        missing = [name for name in parts if name not in tensors]
        if missing:
            raise UserError(f"{folder}: the weights lack {missing[0]}")
        pieces = [tensors[name] for name in parts]
        weights[ours] = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        if weights[ours].shape != shapes[ours]:
            asked = f"config.json asks for {list(shapes[ours])}"
            if "score.weight" in parts:
                asked = "a reward model has one label"
            found = list(weights[ours].shape)
            raise UserError(f"{folder}: {' + '.join(parts)} is {found}, {asked}")
        used |= parts.keys()
    unknown = [name for name in tensors if name not in used | {"lm_head.weight"}
               and not name.endswith("rotary_emb.inv_freq")]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(f"{folder}: weights that no Llama has: {unknown[0]}{more}")
    return weights


def has_own_head(tensors):
    """Do a folder's tensors hold an output matrix that differs from the embedding?

    If so, transformers uses it, whatever config.json says of the two being tied.
    """
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    return head is not None and embedding is not None and not (
        head.shape == embedding.shape and torch.equal(head, embedding.to(head.dtype)))


def end_ids(folder, raw, tokenizer, vocabulary):
    """The ids that end an answer: those of generation_config.json, config.json or the tokenizer.

    raw: config.json's dict. vocabulary: how many ids the model has. Raises UserError for an id that
    is none.
    """
    path = folder / "generation_config.json"
    settings = read_json(path) if path.is_file() else {}
    ends = settings.get("eos_token_id", raw.get("eos_token_id"))
    if ends is None:
        ends = tokenizer.special.get(tokenizer.names.get("eos_token"))
    ends = ends if isinstance(ends, list) else [ends]
    if not all(e is None or type(e) is int and 0 <= e < vocabulary for e in ends):
        raise UserError(f"{folder}: eos_token_id in generation_config.json is not an id of the "
                        "vocabulary, or several")
    beyond = tokenizer.beyond(vocabulary)
    if beyond:
        raise UserError(f"{folder}: the tokenizer may write {beyond[0]!r}, whose id the model does "
                        f"not have: it has {vocabulary} ids, from 0 on")
    return {e for e in ends if e is not None}


def _keep_the_tokenizer(path):
    """See that transformers 5 reads tokenizer.json as we do, whatever class the settings name."""
    settings = read_json(path) if path.is_file() else {}
    if settings.get("tokenizer_class") in BUILT_ANEW:
        _write_json(path, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})


def write_folder(folder, raw, tensors, copy_from, end_ids=None, variables=None):
    """Write a model's folder: config.json, tensors, and the tokenizer's files of another folder.

    end_ids: all ids that end an answer. generation_config.json gets them where the other folder's
    files name different ones: transformers and vLLM then stop where we do.
    variables: those of the chat template that the model was trained with, for README.md.
    The weights come last and by renaming, so a model.safetensors that is there is whole.
    Raises UserError where it cannot be written.
    """
    folder = Path(folder)
    new = folder / "model.safetensors.new"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "config.json", raw)
        for name in TOKENIZER_FILES:
            if (copy_from / name).is_file() and copy_from.resolve() != folder.resolve():
                shutil.copyfile(copy_from / name, folder / name)
        _keep_the_tokenizer(folder / "tokenizer_config.json")
        path = folder / "generation_config.json"
        settings = read_json(path) if path.is_file() else {}
        named = settings.get("eos_token_id", raw.get("eos_token_id"))
        if end_ids and set(named if isinstance(named, list) else [named]) != end_ids:
            _write_json(path, settings | {"eos_token_id": sorted(end_ids)})
        if variables:
            (folder / "README.md").write_text(
                "Trained with these variables of the chat template (chat_template_kwargs): "
                f"{json.dumps(variables)}\n", encoding="utf-8")
        save_file(tensors, new, metadata={"format": "pt"})
        shutil.copymode(folder / "config.json", new)  # for whom it is to be read, as the others
        new.replace(folder / "model.safetensors")
    except (OSError, SafetensorError) as error:
        if folder.is_dir():
            new.unlink(missing_ok=True)  # it takes up the room that is missing
        raise UserError(f"{folder} cannot be written ({one_line(error)})") from None


def _write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
