"""Text: a model folder's tokenizer and its chat template."""
import json
import re
from datetime import datetime
from functools import cached_property
from os.path import commonprefix
from pathlib import Path

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken
from tokenizers import Tokenizer as TextTokenizer

from support.console import UserError, one_line, time_limit
from support.files import read_json

TEMPLATE_SECONDS = 10  # for one conversation
LONGEST_TOKEN = 1000  # characters: the library takes minutes for a special token of 100,000
MAX_TEXT = 2**28  # characters of a rendered conversation: far above any real one
NO_THOUGHT = "\n</think>\n\n"  # closes a thought that a prompt has opened


class Tokenizer:
    """A model folder's tokenizer.json and chat template.

    variables: what the user sets for the template. remarks: what a user should know of them.
    special: {text of a special token: its id}. names: {"bos_token": its text, ..}, those that the
    folder gives. date: the moment, in ISO form, that templates take for now.
    """

    MARK = "\ue000"  # a private character that breaks up text which would spell a special token

    def __init__(self, folder, date=None, variables=None):
        """folder: in Hugging Face layout. Raises UserError for what is missing or does not load.

        date: in ISO form; None: this moment. It stands still. A run that goes on another day gives
        the date that it began with, and has the same prompts. variables: others that the chat
        template reads, {name: value}.
        """
        folder = Path(folder)
        settings = read_json(folder / "tokenizer_config.json")
        self.text = _read_tokenizer(folder / "tokenizer.json")
        self.names, self.special = _name_tokens(folder, settings, self.text)
        by_length = sorted(map(re.escape, self.special), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(by_length) + ")") if self.special else None
        self.date = date or datetime.now().isoformat()
        try:
            now = datetime.fromisoformat(self.date)
        except (TypeError, ValueError):
            raise UserError(f"{date!r} is no date in ISO form, as 2026-11-25") from None
        source = _read_template(folder, settings)
        self.template = _compile(folder, source, now)
        self.variables = variables or {}
        reads = meta.find_undeclared_variables(self.template.environment.parse(source))
        self.remarks = [f"the chat template reads {name}, and --template-args does not set it"
                        for name in {"enable_thinking"} & reads - set(self.variables)]
        self.remarks += [f"the chat template does not read {name} of --template-args"
                         for name in self.variables if name not in reads]

    def beyond(self, vocabulary):
        """The tokens that may be written and whose ids are not below `vocabulary`.

        Special tokens come from the template alone. So one that it does not write, such as a [PAD]
        that somebody added, does no harm.
        """
        user, assistant = ({"role": role, "content": "a"} for role in ("user", "assistant"))
        try:
            written = {*self.chat([user]), *self.chat([user, assistant], False)}
        except UserError:  # a template that refuses such a conversation
            written = set(self.special.values())
        return sorted(token for token, i in self.text.get_vocab().items() if i >= vocabulary
                      and (i in written or token not in self.special))

    def encode(self, text):
        """Ids of plain text: nothing in it becomes a special token, nothing is put around it."""
        self.text.encode_special_tokens = True
        return self._encode(text)

    def _encode(self, text, tokenizer=None):
        try:
            return (tokenizer or self.text).encode(text, add_special_tokens=False).ids
        except Exception as error:  # the tokenizers library raises nothing more specific
            raise UserError(f"the tokenizer cannot take {text[:40]!r} "
                            f"({one_line(error)})") from None

    def decode(self, ids):
        """Text of ids, special tokens left out."""
        return self.text.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages, add_generation_prompt=True, room=None):
        """Ids of a conversation, as the folder's own template writes it.

        messages: [{"role": .., "content": ..}, ..]. The ids are those of transformers'
        apply_chat_template, with one difference: special tokens come from the template alone. Text
        that spells one stays text.
        room: how many ids there may be. The last message is cut from behind until they fit, or
        nothing of it is left. A sampled text needs this: it may have more ids when it is decoded
        and encoded again than it was sampled with.
        Raises UserError where the template refuses the conversation.
        """
        ids = self._ids(self._render(messages, add_generation_prompt))
        while room is not None and len(ids) > room and messages[-1]["content"]:
            *before, last = messages
            shorter = last["content"][:room - len(ids)]  # by as many characters as ids are too many
            messages = [*before, {**last, "content": shorter}]
            ids = self._ids(self._render(messages, add_generation_prompt))
        return ids

    def reply(self, messages, text, end_ids):
        """Ids of a person's answer, as the model would have written it after chat(messages).

        They are what the template writes after the prompt, up to the first of end_ids. Where it
        writes another prompt before an answer, or not the whole answer (many leave out a thought),
        the text is encoded by itself, and the end token follows.
        A thought, <think>..</think>, that the prompt has opened goes on: the answer's own opening
        tag is left out, and before an answer without a thought the opened one is closed.
        Raises UserError where the template writes no end token.
        """
        prompt = self._render(messages)
        ids = self._written(prompt, messages, text)
        if ids is None:
            ids = self._by_itself(prompt, text)
        ends = [i for i, token in enumerate(ids) if token in end_ids]
        return ids[:ends[0] + 1] if ends else [*ids, self.end_of_turn(end_ids)]

    def choices(self, messages, words):
        """(lead, ids): what a model says first if it answers a conversation with one of the words.

        ids: one for each word. lead: the ids between chat(messages) and the word, often []. Some
        tokenizers write a space before it, and some templates an empty thought.
        words: two or more. Raises UserError where one is not a single token, or two share theirs.
        """
        prompt = self._render(messages)
        answers = [self._written(prompt, messages, word) for word in words]
        if None in answers:
            answers = [self._by_itself(prompt, word) for word in words]
        lead = commonprefix(answers)
        here = len(lead)
        ids = [answer[here] for answer in answers if len(answer) > here]
        alone = [self.decode([i]).strip() for i in ids] == list(words)
        if not alone or any(answer[here + 1:] != answers[0][here + 1:] for answer in answers):
            raise UserError(f"the tokenizer does not write {', '.join(words)} as one token each")
        return lead, ids

    def spoken(self, text):
        """What a completion says to others: without the thought that it begins with.

        Nothing, where the thought was cut before it ended.
        """
        if not (self.opens_thought or text.lstrip().startswith("<think>")):
            return text
        return text.partition("</think>")[2].lstrip("\n")

    @cached_property
    def opens_thought(self):
        """Does the prompt for an answer leave a <think> open?"""
        try:
            return _opened(self._render([{"role": "user", "content": "a"}]))
        except UserError:  # a template that refuses such a conversation
            return False

    @property
    def turn_end(self):
        """The id of the first special token that the template writes after an answer, or None."""
        special = set(self.special.values())
        try:
            return next((i for i in self._ending if i in special), None)
        except UserError:  # a template that refuses such a conversation
            return None

    def end_of_turn(self, end_ids):
        """The id that the template writes after an assistant's answer: one of end_ids.

        Raises UserError where it writes none of them.
        """
        ends = [i for i in self._ending if i in end_ids]
        if not ends:
            raise UserError("the chat template ends an assistant's answer with none of the model's "
                            "end tokens")
        return ends[0]

    @cached_property
    def _ending(self):
        """The ids after an answer: those in which conversations with two answers end alike."""
        user = {"role": "user", "content": "a"}
        b, c = (self.chat([user, {"role": "assistant", "content": text}], False)[::-1]
                for text in "bc")
        return commonprefix([b, c])[::-1] if b != c else []

    def _written(self, prompt, messages, text):
        """The ids that the template writes after a rendered prompt for an answer.

        None where it does not write this prompt before an answer, or not the whole text.
        """
        whole = self._render([*messages, {"role": "assistant", "content": text}], False)
        if not whole.startswith(prompt) or self._disarm(text.strip()) not in whole[len(prompt):]:
            return None
        ids, start = self._ids(whole), self._ids(prompt)
        return ids[len(start):] if ids[:len(start)] == start else None

    def _by_itself(self, prompt, text):
        """The ids of an answer's text after a rendered prompt, without an end token."""
        thought, tag, answer = text.partition("</think>")
        if not _opened(prompt):
            text = self._disarm(text)
        elif tag or text.lstrip().startswith("<think>"):  # it goes on with the opened thought
            thought = thought.lstrip().removeprefix("<think>")
            thought = thought.lstrip("\n") if prompt.endswith("\n") else thought
            text = self._disarm(thought) + tag + self._disarm(answer)
        else:
            text = NO_THOUGHT + self._disarm(text)
        start, ids = self._ids(prompt), self._ids(prompt + text)
        # Encoded together, so that nothing comes between the two, unless that changed the prompt.
        return ids[len(start):] if ids[:len(start)] == start else self._ids(text)

    def _render(self, messages, add_generation_prompt=True):
        """The template's text. In what people wrote, marks break up the special tokens."""
        safe = [{**m, "content": self._disarm(m["content"])} for m in messages]
        late = f"the chat template took longer than {TEMPLATE_SECONDS} seconds"
        pieces, size = [], 0
        try:
            with time_limit(TEMPLATE_SECONDS, late):
                for piece in self.template.generate(
                        messages=safe, add_generation_prompt=add_generation_prompt,
                        tools=None, documents=None, **self.names | self.variables):
                    pieces.append(piece)
                    size += len(piece)
                    if size > MAX_TEXT:
                        raise UserError("the chat template writes without end")
        except UserError:
            raise
        except Exception as error:  # whatever somebody's template may raise
            raise UserError(f"the chat template failed: {one_line(error)}") from None
        return "".join(pieces)

    def _ids(self, text):
        """Ids of a rendered text: special tokens where it spells them, but for marked ones."""
        if self.MARK not in text:  # nobody's text spells a special token
            self.text.encode_special_tokens = False
            return self._encode(text)
        ids, first = [], self.text
        for i, part in enumerate(self._split.split(text)):  # text, special, text, special, ..
            if i % 2:
                ids.append(self.special[part])
            elif part:
                tokenizer = self._inside if ids else first
                tokenizer.encode_special_tokens = True
                ids += self._encode(part.replace(self.MARK, ""), tokenizer)
        return ids

    @cached_property
    def _inside(self):
        """The tokenizer for a piece that does not begin a text: some put a space before those."""
        settings = json.loads(self.text.to_str())
        whole = settings.get("pre_tokenizer") or {}
        first = [part for part in whole.get("pretokenizers", [whole])
                 if part.get("prepend_scheme") == "first"]
        for part in first:
            part["prepend_scheme"] = "never"
        return TextTokenizer.from_str(json.dumps(settings)) if first else self.text

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


def _name_tokens(folder, settings, text):
    """(names, special) of a Tokenizer. Tells `text` what the other files say of its tokens.

    As in transformers 5: special_tokens_map.json and added_tokens.json are older files. They are
    read, and win, where tokenizer_config.json does not list the added tokens itself. A named token
    is special, and one that tokenizer.json lacks gets the next free id.
    """
    def if_there(name):
        return read_json(folder / name) if (folder / name).is_file() else {}

    listed, numbered = settings.get("added_tokens_decoder", {}), {}
    if "added_tokens_decoder" not in settings:
        settings = settings | if_there("special_tokens_map.json")
        numbered = if_there("added_tokens.json")
    extra = settings.get("extra_special_tokens", settings.get("additional_special_tokens")) or []
    named = {key: value for key, value in settings.items()
             if key.endswith("_token") and isinstance(value, (str, dict))}
    if isinstance(extra, dict):
        named, extra = named | extra, []
    names = {key: _token_text(token) for key, token in named.items()}
    before = text.get_added_tokens_decoder()
    try:
        added = {token.content: token for _, token in sorted(before.items())}
        for _, token in sorted(listed.items(), key=lambda item: int(item[0])):
            added[_token_text(token)] = _added_token(token)
        for token, _ in sorted(numbered.items(), key=lambda item: item[1]):
            added.setdefault(token, AddedToken(token, normalized=token not in names.values()))
        for token in [*named.values(), *extra]:
            added.setdefault(_token_text(token), _added_token(token, special=True))
        for token in names.values():
            added[token].special = True
        text.add_tokens([token for token in added.values() if token.content])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: the special tokens in its settings are not readable "
                        f"({one_line(error)})") from None
    was_special = {token.content for token in before.values() if token.special}
    special = {token.content: i for i, token in text.get_added_tokens_decoder().items()
               if token.special or token.content in was_special}
    return names, special


def _added_token(token, **flags):
    """The tokenizers library's token of a text or a dict. Raises TypeError for anything else."""
    if not isinstance(token, (str, dict)) or len(_token_text(token)) > LONGEST_TOKEN:
        raise TypeError(f"{str(token)[:40]!r} is no token")
    if isinstance(token, dict):
        keys = ("lstrip", "rstrip", "normalized", "single_word", "special")
        flags = {key: token[key] for key in keys if key in token} | flags
    return AddedToken(_token_text(token), **flags)


def _token_text(token):
    """A token's text: the text itself, or older files' dict of it. "" for anything else."""
    if isinstance(token, dict):
        return _token_text(token.get("content"))
    return token if isinstance(token, str) else ""


def _opened(prompt):
    """Does a rendered prompt leave a thought open?"""
    return prompt.rstrip().endswith("<think>")


def _read_template(folder, settings):
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = [t for t in template if isinstance(t, dict) and t.get("name") == "default"]
        template = named[0].get("template") if named else None
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            template = path.read_text(encoding="utf-8-sig")  # with or without a byte order mark
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: not readable as text ({one_line(error)})") from None
    if not isinstance(template, str) or not template:
        raise UserError(f"{folder}: no chat_template in tokenizer_config.json: "
                        "is this an instruct model?")
    return template


class _Generation(Extension):
    """{% generation %} .. {% endgeneration %}: it marks what to train on, and writes nothing."""
    tags = {"generation"}

    def parse(self, parser):
        """The tag's body, as it stands."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True),
                           lineno=line)


def _compile(folder, template, now):
    """The compiled template, with what transformers offers to it, so that any author's renders."""
    def raise_exception(message):
        raise TemplateError(message)

    def to_json(value, ensure_ascii=False, **form):
        return json.dumps(value, ensure_ascii=ensure_ascii, **form)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                extensions=["jinja2.ext.loopcontrols", _Generation])
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    environment.filters["tojson"] = to_json
    try:
        return environment.from_string(template)
    except (TemplateError, ValueError, RecursionError, MemoryError, OverflowError,
            TypeError) as error:
        raise UserError(f"{folder}: the chat template does not compile "
                        f"({one_line(error)})") from None
