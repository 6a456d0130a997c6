"""What a worked answer comes to, and whether two answers are equal.

Plain numbers are compared exactly, anything else by support/mathematics.py. It is strict: to pay
for a wrong answer is worse than not to pay for a right one.
"""
import re
import unicodedata
from fractions import Fraction

from support import mathematics

# Units of measurement; the first of each row stands for the others. Other words do not count.
UNITS = {word: row.split()[0] for row in """% percent|$ dollar dollars|€ euro euros|
    £ pound pounds lb lbs|¢ cent cents|° degree degrees|°C|°F|mm millimeter millimeters|
    cm centimeter centimeters|m meter meters|km kilometer kilometers|inch inches|ft foot feet|
    yd yard yards|mi mile miles|mi/h mph|g gram grams|kg kilogram kilograms|oz ounce ounces|ml mL|
    l L liter liters|s sec second seconds|min mins minute minutes|h hr hrs hour hours|day days|
    week weeks|month months|year years""".split("|") for word in row.split()} | {"in": "inch"}
# "5 in all" is no length.
UNIT = (r"(?:in(?=\.?$|\^)|" + "|".join(sorted(map(re.escape, UNITS.keys() - {"in"}), key=len,
        reverse=True)) + r")(?![a-zA-Z])(?:[ ]?\^\{?[23]\}?)?")
SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
          "trillion": 10**12, "dozen": 12}
POWER = r"10\^(?:\{[+-]?\d\d?\}|[+-]?\d\d?)"
# A number in plain text: 1,234.50, 1 234, 1.234,5, -$3, 1e5, 3 × 10^8, 3/4, 2 1/2, 5 cm.
# A piece of a longer expression is none: 2^10, 1,2, 5x, 5:30. One that is joined to what stands
# before it is not clear: 5 or 6, 3, 4, x - 2, half of 8.
NUMBER = re.compile(rf"""
    (?P<joined>(?:(?<=[\d)%])(?:\s*[,;&|]|\s+:)\s*
            |(?<=[\d)%])\s+(?:or|and|to|times|plus|minus|over|x|of)\s+)(?:[a-zA-Z]\s*=\s*)?
        |(?<=\d)[ ]+|[-+*/×÷·±<>≤≥≠√^]\s+\(?|\\[a-zA-Z]+\s+
        |(?:n't|\b(?i:not|than|least|most|twice|double|triple|step|part|case|mod|choose|sqrt|log|ln
            |sin|cos|tan|(?:root|half|third|quarter|percent|negative)\s+of))(?:\s+|\(\s*))?
    (?<![\w.^/*+{{}}\\×÷·±<>≤≥≠√—-])(?<!\d[,:~])(?<![\w)+*/-]\()
    (?P<sign>[+-]?)(?P<money>[$€£]?)(?P<minus>-?)
    (?:(?P<mixed>\d+)[ ](?P<part>[1-9]\d*/[1-9]\d*)
      |(?P<ten>{POWER})
      |(?P<base>[1-9]\d{{0,2}}(?:(?:\.\d{{3}})+,\d+|(?:\.\d{{3}}){{2,}})
          |(?:[1-9]\d{{0,2}}(?:(?:,\d{{3}})+|(?:[ ]\d{{3}})+|(?:['’]\d{{3}})+)|\d+)(?:\.\d+)?
          |\.\d+)
       (?P<power>[eE][+-]?\d\d?|[ ]?[x×·*][ ]?{POWER})?(?:/(?P<under>[1-9]\d*))?)
    (?:[ ](?P<scale>{"|".join(SCALES)})s?\b)?
    (?P<unit>(?:(?:[ ](?:square|sq\.?|cubic)[ ]|[ -]|(?=[a-zA-Z]{{2}}|[%°¢])){UNIT})?
             (?:[ ]?(?:/|per[ ]|an?[ ]){UNIT})?)
    (?![\w^*{{°%(!?]|[ ]?[\\√π]|[.,:]\d|\.\.|/(?![a-zA-Z]{{2}})
      |[ ]?(?:pi|sqrt|squared|cubed|factorial|choose|mod|bn|halves|thirds|fifths|(?:\w*d|ten)ths
          |(?:less|more)[ ]than|[b-zB-HJ-Z])\b
      |[ ]?[-+*/×÷·=<>≤≥^|]\s*(?:[a-zA-Z]\b|[\\(√\d]))""", re.VERBOSE)
PLAIN = r"-?\d+(?:/\d+)?"  # such a number as final_answer writes it
# What announces an answer in words, and the variable that an answer is the value of.
MARK = re.compile(r"####|\banswer(?:[^.:\n\d]{0,40}?\bis\b\s*:?|\s*[:=])|\bfinal answer\b:?", re.I)
NAME = re.compile(r"([a-zA-Z](?:_\{?\w\}?)?|[a-z]\([a-z]\))\s*(?:=|\\in(?![a-z]))\s*(?=[^=]*$)")
WORDS = r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\{([^{}]*)\}"  # in LaTeX
SIGNS = [  # LaTeX around numbers, and how it is written in plain text
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-z]))", "°"), (r"\\times(?![a-z])", "×"),
    (r"\\cdot(?![a-z])", "·"), (r"\\pm(?![a-z])", "±"), (r"\\\$", "$"), (r"\\%", "%"),
    (r"\\l(?:eq?|t)(?![a-z])", "≤"), (r"\\g(?:eq?|t)(?![a-z])", "≥"),
    (r"\\neq?(?![a-z])", "≠"),
    (r"\\(?:to|rightarrow|Rightarrow|implies|approx)(?![a-z])", "="),
    (r"\\[()\[\]]|\\(?:left|right)(?![a-z])|(?<!\\)\\[ ,;!]", " ")]


def unclear(known):
    """Why a known answer cannot be judged by, as the end of a sentence; None where it can."""
    found, text = final_answer(known), known.strip()
    marked = "####" in known or "\\boxed{" in known
    alone = re.fullmatch(r"\(?[A-Z]\)?", text) or number_in(clean(text), alone=True)
    if found is None or not (marked or alone):
        return "is neither a number nor marked by #### or \\boxed{}"
    if not mathematics.version() and not re.fullmatch(PLAIN + "|[a-zA-Z]+", found):
        return f"is no plain number ({found[:60]}): pip install math-verify, which judges it"
    return None


def judges():
    """Who judges what, as a sentence."""
    version = mathematics.version()
    return "plain numbers are compared exactly, other answers " + (
        f"by math-verify {version}" if version else
        "as they are written (pip install math-verify, and it judges them)")


class Answer(str):
    """What a text comes to: a number, as a fraction in lowest terms, or an expression as it stands.

    unit: of measurement. name: of the variable that it is the value of. Both are mostly "".
    """

    def __new__(cls, value, unit="", name=""):
        """value: the text."""
        self = super().__new__(cls, value)
        self.unit, self.name = unit, name
        return self


def same(known, given):
    """Are two Answers equal? Symmetric. None, an answer that cannot be read, equals nothing.

    A unit or a variable's name may be left out. Where both have one, it must be the same.
    """
    if known is None or given is None:
        return False
    for x, y in ((known.unit, given.unit), (known.name, given.name)):
        if x and y and x != y:
            return False
    if known == given or re.fullmatch(PLAIN, known) and re.fullmatch(PLAIN, given):
        return known == given
    return mathematics.version() is not None and mathematics.equal(known, given)


def final_answer(text):
    """What a worked answer comes to, an Answer, or None where that is not clear.

    That is its last boxed expression; or what the last "####", "the answer is" or "Answer:" marks,
    on that line; or else its last number. Only what follows the last </think> counts.
    It is strict. A number that may be a piece of something else is none, so at times it pays less
    than is due, but not more.
    """
    text = clean(text.rpartition("</think>")[2])
    if "<think>" in text:
        return None
    if "\\boxed{" in text:
        inside = boxed(text).strip()
        bare = re.search(r"\d *[a-zA-Z]$", inside)  # 5m is a product; 5\text{m} would be a length
        found = None if bare else number_in(inside)
        return expression(inside) if found is None else found
    for mark in list(MARK.finditer(text))[:-20:-1]:
        line = text[mark.end():].lstrip("*_ :\t\n").partition("\n")[0]
        clear, found = marked_answer(line, mark[0] == "####")
        if clear:
            return found
    text = plain(re.sub(r"(?m)^ *#+ .*$", "", text))  # without headings
    numbers = list(NUMBER.finditer(text))
    if len(numbers) > 1 and text[numbers[-2].end():numbers[-1].start()].strip() in ("", "and"):
        return None  # 5 hours and 3 minutes
    if not numbers or numbers[-1]["joined"] or re.search(r"\d", text[numbers[-1].end():]):
        choice = re.fullmatch(r"\s*\(?([A-Z])[.)]*\s*", text)
        return Answer(choice[1]) if choice else None
    return value_of(numbers[-1])


def marked_answer(line, sharp):
    """(is this a mark of an answer?, the Answer or None) of the line behind a mark.

    sharp: the mark is ####, which also begins a heading in Markdown.
    """
    heading = re.match(r"[a-zA-Z]{2,}", line) and not re.fullmatch("[a-zA-Z ]+", line)
    if not sharp:
        line = re.split(r"[.;?](?:\s|$)", line)[0]  # the first sentence
    letters = set(re.findall(r"\b[A-Z]\b", line))  # of multiple choice
    if re.match(r"\([A-Z]\)|[A-Z](?:[.):]|\s*$)", re.sub(WORDS, r"\1", line)):
        return True, Answer(*letters) if len(letters) == 1 else None
    if re.match("not ", line):
        return True, None
    chain = re.match(r"(?:[a-zA-Z]\s*=)?(?:[^a-zA-Z=]*=)*", plain(line))  # x = 2 + 3 = 5
    found = number_in(line) or number_in(plain(line)[chain.end():])
    if found is not None and not (sharp and re.match(r"\d+\. ", line)):  # 3. Add: a heading
        return True, found
    if sharp:
        heading = heading or re.match(r"\d+[.)] ", line)
        return bool(line) and not heading, expression(line)
    inline = re.match(r"\$([^$]+)\$|\\\((.+?)\\\)", line)
    if inline or re.fullmatch("(?i:yes|no|true|false)", line):
        return True, expression(inline[1] or inline[2] if inline else line)
    words = re.search(r"[a-zA-Z]{3}|\b[a-zA-Z]{2}\b", re.sub(r"\\[a-zA-Z]+", "", line))
    return bool(re.search(r"[\d\\]", line)), None if words else expression(line)


def expression(text):
    """An Answer that is no plain number: the text without needless spaces. None if it is empty."""
    text = re.sub(WORDS, r"\1", text).strip().strip("$").strip().rstrip(".")
    if choice := re.fullmatch(r"\(?([A-Z])\)?[.):]?", text):
        return Answer(choice[1])
    name = NAME.match(text)
    text = text[name.end():] if name else text
    if re.fullmatch(r"[A-Z][a-z]+(?: [a-z]+)*", text):
        text = text.lower()  # Yes is yes, but X is not x
    # A space stays between two digits, and between a command and a letter: 1 2 is not 12.
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"(\\[a-zA-Z]+ )(?=[a-zA-Z])|(?<=\d)( )(?=\d)| ", lambda m: m[1] or m[2] or "",
                  text)
    return Answer(text, name=name[1] if name else "") if text else None


def number_in(text, alone=False):
    """The number that a short text is about, an Answer; None where there is none, or a second one.

    alone: it must have no words beside it.
    """
    name = NAME.match(text)
    text = plain(text[name.end():] if name else text).strip().rstrip(" .$")
    text = re.sub(r"^- +(?=[\d.$])", "-", text)
    found = list(NUMBER.finditer(text))
    if len(found) != 1 or found[0]["joined"]:
        return None
    before, after = (re.sub(r"\([a-zA-Z ]+\)", "", beside) for beside in (
        text[:found[0].start()].rstrip("$ "), text[found[0].end():]))
    rest = before + after
    if re.search(r"[\d\\^_{}+*/<>|()\[\]√π±≤≥≠!]", rest) or alone and rest.strip():
        return None
    # Step 3 is a heading. Total: 18 is an answer, and so is: the total is 18.
    announced = r"\b(?:is|are|of|about|therefore|thus|exactly|only)$"
    if re.search("[a-zA-Z]$", before) and not re.search(announced, before):
        return None
    return value_of(found[0], name[1] if name else "")


def value_of(match, name=""):
    """The Answer that a match of NUMBER is. A number of a hundred digits stays a text."""
    part = match.groupdict(default="")
    digits = re.sub("[ '’]", "", part["base"])
    if re.fullmatch(r"\d+(\.\d{3})+,\d+|\d+(\.\d{3}){2,}", digits):  # 1.234,5
        digits = digits.replace(".", "").replace(",", ".")
    if len(match[0]) >= 100:
        return Answer(match[0].strip())
    power = re.sub(r"[{} eE]|[x×·*]? ?10\^", "", part["power"] or part["ten"])
    number = Fraction(digits.replace(",", "") or part["mixed"] or 1) + Fraction(part["part"] or 0)
    number *= Fraction(10) ** int(power or 0) * SCALES.get(part["scale"], 1)
    number *= Fraction(-1 if "-" in part["sign"] + part["minus"] else 1, int(part["under"] or 1))
    words = re.findall(r"°?[a-zA-Z]+|[$€£%°¢]", part["money"] + part["unit"])
    units = [UNITS[word] for word in words if word in UNITS]
    power = re.search(r"\^\{?([23])|(sq)|(cub)", part["unit"])
    power = power and (power[1] or (power[2] and "2") or "3") or ""
    return Answer(str(number), "/".join(dict.fromkeys(units)) + power, name)


def clean(text):
    """A text whose digits, signs and spaces are written one way."""
    if not text.isascii():
        def simple(match):
            return unicodedata.normalize("NFKC", match[0])
        # These are told from plain digits first: 2³ is not 23, 101₂ not 1012, 3½ not 31/2.
        text = re.sub("[\u00b2\u00b3\u00b9\u2070-\u207e]+", lambda m: f"^{{{simple(m)}}}", text)
        text = re.sub("[\u2080-\u208e]+", lambda m: f"_{{{simple(m)}}}", text)
        text = re.sub("[\u00bc-\u00be\u2150-\u215e]", lambda m: " " + simple(m), text)
        text = unicodedata.normalize("NFKC", text)
        text = re.sub("[\u2010-\u2013\u2212]", "-", text).replace("\u22c5", "·")
        text = re.sub("[\u2044\u2215]", "/", text)
        text = re.sub("\\s*[\u2192\u21d2\u2248]\\s*", " = ", text)
    text = re.sub(r"(?<![\w)])\*\*([^*]+)\*\*(?![\w(])", r"\1", text)  # bold, in Markdown
    text = re.sub(r"<<[^<>]*>>", "", text)  # GSM8K's notes for a calculator
    text = re.sub(r"(?<=\d)(?:\\[, ]|~)(?=\d{3})", " ", text)  # thousands, in LaTeX
    return re.sub(r"(?<=\d)(?:\{,\}|,\\!)(?=\d{3})", ",", text)


def plain(text):
    """A text whose LaTeX around numbers is written in plain signs. Other LaTeX stays."""
    if "\\" in text:
        text = re.sub(WORDS, r" \1", text)
        text = re.sub(r"(\d?)\\[dtc]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))",
                      lambda m: (m[1] and m[1] + " ") + f"{m[2] or m[3]}/{m[4] or m[5]}", text)
        for command, sign in SIGNS:
            text = re.sub(command, sign, text)
    if "$" in text:  # around LaTeX; not of money
        text = re.sub(r"(?<![\w$])\$(?=\S)([^$\n]*[^\s$])\$(?!\d)", r"\1", text)
    text = re.sub(r"[-=]+>", "=", text)
    text = re.sub(r"\b(?i:minus|negative) +(?=[$\d.])", "-", text)
    return re.sub(r" {2,}", " ", re.sub(r"(?<=\d) */ *(?=\d)", "/", text))


def boxed(text):
    """What the last \\boxed{..} of a text holds; "" where it is not closed: then it is cut off."""
    inside = text[text.rindex("\\boxed{") + len("\\boxed{"):]
    depth = 1
    for i, letter in enumerate(inside):
        if letter in "{}" and inside[i - 1:i] != "\\":
            depth += 1 if letter == "{" else -1
        if depth == 0:
            return inside[:i]
    return ""
