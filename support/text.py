"""Text: a model folder's tokenizer and its chat template."""
import json
import re
from datetime import datetime
from pathlib import Path

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as TextTokenizer

from support.console import UserError, one_line, time_limit
from support.files import read_json

TEMPLATE_SECONDS = 10  # for one conversation
MAX_TEXT = 2**28  # characters of a rendered conversation: far above any real one


class Tokenizer:
    """A model folder's tokenizer.json and chat template.

    special: {text of a special token: its id}. names: {"bos_token": its text, ..}.
    """

    MARK = "\ue000"  # a private character that breaks up text which would spell a special token

    def __init__(self, folder):
        """folder: in Hugging Face layout. Raises UserError for what is missing or does not load."""
        folder = Path(folder)
        settings = read_json(folder / "tokenizer_config.json")
        self.text = _read_tokenizer(folder / "tokenizer.json")
        added = self.text.get_added_tokens_decoder().items()
        self.special = {token.content: i for i, token in added if token.special}
        by_length = sorted(map(re.escape, self.special), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(by_length) + ")") if self.special else None
        self.names = {key: _token_text(settings.get(key))
                      for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self.template = _compile(folder, _read_template(folder, settings))

    def encode(self, text):
        """Ids of plain text: nothing in it becomes a special token, nothing is put around it."""
        self.text.encode_special_tokens = True
        return self._encode(text)

    def _encode(self, text):
        try:
            return self.text.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the tokenizers library raises nothing more specific
            raise UserError(f"the tokenizer cannot take {text[:40]!r} "
                            f"({one_line(error)})") from None

    def decode(self, ids):
        """Text of ids, special tokens left out."""
        return self.text.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages, add_generation_prompt=True):
        """Ids of a conversation, as the folder's own template writes it.

        messages: [{"role": .., "content": ..}, ..]. The ids are those of transformers'
        apply_chat_template, with one difference: special tokens come from the template alone. Text
        that spells one stays text.
        Raises UserError where the template refuses the conversation.
        """
        safe = [{**m, "content": self._disarm(m["content"])} for m in messages]
        text = self._render(messages=safe, add_generation_prompt=add_generation_prompt,
                            tools=None, documents=None, **self.names)
        if self.MARK not in text:  # nobody's text spells a special token
            self.text.encode_special_tokens = False
            return self._encode(text)
        ids = []
        for i, part in enumerate(self._split.split(text)):  # text, special, text, special, ..
            if i % 2:
                ids.append(self.special[part])
            elif part:
                ids += self.encode(part.replace(self.MARK, ""))
        return ids

    def end_of_turn(self, end_ids):
        """The id that the template writes after an assistant's answer: one of end_ids.

        Raises UserError where it writes none of them.
        """
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        ids = self.chat(messages, add_generation_prompt=False)
        answer = ids[len(self.chat(messages[:1])):]
        ends = [i for i in answer if i in end_ids]
        if not ends:
            raise UserError("the chat template ends an assistant's answer with none of the model's "
                            "end tokens")
        return ends[0]

    def _render(self, **variables):
        late = f"the chat template took longer than {TEMPLATE_SECONDS} seconds"
        pieces, size = [], 0
        try:
            with time_limit(TEMPLATE_SECONDS, late):
                for piece in self.template.generate(**variables):
                    pieces.append(piece)
                    size += len(piece)
                    if size > MAX_TEXT:
                        raise UserError("the chat template writes without end")
        except UserError:
            raise
        except Exception as error:  # whatever somebody's template may raise
            raise UserError(f"the chat template failed: {one_line(error)}") from None
        return "".join(pieces)

    def _disarm(self, text):
        text = text.replace(self.MARK, "")  # a mark of the user's own would break up nothing
        if not self._split:
            return text
        return self._split.sub(lambda found: found[0][0] + self.MARK + found[0][1:], text)


def _read_tokenizer(path):
    if not path.is_file():
        raise UserError(f"{path.parent}: tokenizer.json is missing")
    try:
        tokenizer = TextTokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises nothing more specific
        raise UserError(f"{path}: not a tokenizer ({one_line(error)})") from None
    tokenizer.no_truncation()  # a trainer's habits, saved with the file
    tokenizer.no_padding()
    return tokenizer


def _token_text(token):
    """A token's text: the text itself, or older files' dict of it. "" for anything else."""
    if isinstance(token, dict):
        return _token_text(token.get("content"))
    return token if isinstance(token, str) else ""


def _read_template(folder, settings):
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    if (folder / "chat_template.jinja").is_file():
        template = (folder / "chat_template.jinja").read_text()
    if not isinstance(template, str) or not template:
        raise UserError(f"{folder}: no chat_template in tokenizer_config.json: "
                        "is this an instruct model?")
    return template


def _compile(folder, template):
    """The compiled template, with what transformers offers to it, so that any author's renders."""
    def raise_exception(message):
        raise TemplateError(message)

    def to_json(value, indent=None):
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols"])
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.filters["tojson"] = to_json
    try:
        return environment.from_string(template)
    except (TemplateError, ValueError, RecursionError, MemoryError, OverflowError,
            TypeError) as error:
        raise UserError(f"{folder}: the chat template does not compile "
                        f"({one_line(error)})") from None
