"""Which of two models do people prefer? The paper's test (section 4): 100 PartiPrompts, two pictures side by
side, two questions, and the shares of win, draw and lose.

    python sample.py --prompts PartiPrompts.tsv --checkpoint A --out a      and the same for another model, b
    python -m evaluation.preference a b                                     opens a page of this machine

The page is blind: --seed decides which model is on the left. It shows the prompt as the file's name has it:
without slashes and underscores, and cut at 255 bytes. Keys: ← left, → right, ↓ draw, Backspace takes the last
answer back. Each answer is written to --out at once; the same command goes on where it was stopped.
Shares are given with their 95 % interval (Wilson 1927), and drawn to NAME.png beside NAME.json.
"""
import base64
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from common.figures import FONT
from common.files import written_whole
from common.flags import SEEDS, flag, read, run_command
from common.serve import serve

PAGE = Path(__file__).with_suffix(".html")
QUESTIONS = {"quality": "Which picture looks better?", "alignment": "Which picture shows what the text says?"}
KINDS = {".png": "png", ".gif": "gif", ".webp": "webp", ".jpg": "jpeg"}


@dataclass
class Flags:
    out: str = flag("preference.json", "answers and result; a picture of it lies beside")
    seed: int = flag(0, "of which model is on which side", low=0, high=SEEDS)
    port: int = flag(8001, "of the page", low=1024, high=65535)


def samples_of(folder):
    """{name: path} of the pictures of a folder, or of its folder samples/, as sample.py writes them.
    ValueError if it has none."""
    folder = Path(folder)
    place = folder / "samples" if (folder / "samples").is_dir() else folder
    found = {path.stem: path for path in sorted(place.glob("*")) if path.suffix in KINDS}
    if not found:
        hint = "`python sample.py --prompts FILE --out FOLDER` makes one"
        raise ValueError(f"{folder}: no folder with pictures; {hint}")
    return found


class Test:
    """The pairs of two folders, and what was answered. ValueError if the folders have no name in common, or
    the file `out` is of another test."""

    def __init__(self, a, b, out, seed):
        self.a, self.b, self.out, self.seed = samples_of(a), samples_of(b), Path(out), seed
        names = [name for name in self.a if name in self.b]
        if not names:
            raise ValueError(f"{a} and {b} have no picture of the same name: draw them from the same prompts")
        self.asked = [(question, name) for question in QUESTIONS for name in names]
        self.settings = dict(a=str(a), b=str(b), seed=seed, pairs=len(names))
        # "question name" → a, b or draw, in the order of answering
        self.answers = self.answers_before() if self.out.exists() else {}

    def answers_before(self):
        try:
            before = json.loads(self.out.read_text(encoding="utf-8"))
            same = {name: before[name] for name in self.settings} == self.settings
            answers = dict(before["answers"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"--out {self.out}: no result of this command; give another file") from None
        if not same:
            raise ValueError(f"--out {self.out}: of other folders or another seed; give another file")
        return answers

    def a_is_left(self, question, name):
        return hashlib.sha256(f"{self.seed} {question} {name}".encode()).digest()[0] % 2 == 0

    def next(self):
        """The first pair without an answer, as the page shows it, or the result."""
        for number, (question, name) in enumerate(self.asked):
            if f"{question} {name}" not in self.answers:
                sides = (self.a, self.b) if self.a_is_left(question, name) else (self.b, self.a)
                left, right = (address(side[name]) for side in sides)
                prompt = name.rpartition("_")[0] or name  # PROMPT_NUMBER
                shown = dict(question=question, asked=QUESTIONS[question], name=name, prompt=prompt)
                return shown | dict(left=left, right=right, number=number + 1, of=len(self.asked))
        return dict(result=self.result(), of=len(self.asked))

    def answer(self, asked):
        """What the page asks: {} for the next pair; question, name and choice (left, right or draw) to answer
        one; undo to take the last answer back. Returns the next pair. ValueError for anything else."""
        if asked == {"undo": True}:
            if self.answers:
                self.answers.popitem()
                self.write()
        elif asked:
            pair, choice = (asked.get("question"), asked.get("name")), asked.get("choice")
            if pair not in self.asked or choice not in ("left", "right", "draw"):
                raise ValueError("this is no answer to a pair of this test")
            if choice != "draw":
                choice = "a" if (choice == "left") == self.a_is_left(*pair) else "b"
            self.answers[" ".join(pair)] = choice
            self.write()
        return self.next()

    def result(self):
        """{question: {"win": share, "draw", "lose", "interval of win": [low, high], …, "answers"}} for A."""
        found = {}
        for question in QUESTIONS:
            given = [choice for pair, choice in self.answers.items() if pair.startswith(f"{question} ")]
            row = dict(answers=len(given))
            for kind, choice in (("win", "a"), ("draw", "draw"), ("lose", "b")) if given else ():
                row[kind] = given.count(choice) / len(given)
                row[f"interval of {kind}"] = interval(given.count(choice), len(given))
            found[question] = row
        return found

    def write(self):
        with written_whole(self.out) as part:
            whole = self.settings | dict(result=self.result(), answers=self.answers)
            part.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        with written_whole(self.out.with_suffix(".png")) as part:
            bars(self.result()).save(part)


def address(path):
    """A picture's file → its address in a page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f"data:image/{KINDS[path.suffix]};base64,{data}"


def interval(count, total, z=1.96):
    """Wilson's interval of a share, at 95 %: [low, high]."""
    share, weight = count / total, 1 + z * z / total
    centre = (share + z * z / (2 * total)) / weight
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total**2)) / weight
    return [max(0.0, centre - half), min(1.0, centre + half)]


def bars(result, width=640):
    """A bar of win, draw and lose for each question: a Pillow image."""
    image = Image.new("RGB", (width, 24 + 56 * len(result)), "white")
    pen, left = ImageDraw.Draw(image), 90
    colours = {"win": (30, 90, 200), "draw": (190, 190, 190), "lose": (220, 120, 60)}
    for number, (question, row) in enumerate(result.items()):
        x, y = left, 16 + 56 * number
        pen.text((8, y + 12), question, fill="black", font=FONT)
        pen.text((left, y + 38), f"{row['answers']} answers", fill="black", font=FONT)
        for kind, colour in colours.items():
            end = x + row.get(kind, 0) * (width - left - 16)
            if end - x >= 1:
                pen.rectangle([x, y, end, y + 34], fill=colour)
                label = f"{kind} {100 * row[kind]:.1f} %"
                if end - x > pen.textlength(label, font=FONT) + 8:
                    pen.text((x + 5, y + 10), label, fill="white" if kind == "win" else "black", font=FONT)
            x = end
    return image


def main(arguments):
    about = "A blind test of two folders of pictures, in a page of this machine."
    flags, _, words = read(Flags, arguments, "python -m evaluation.preference", about, "FOLDER_A FOLDER_B")
    if len(words) != 2:
        raise ValueError("give two folders: python -m evaluation.preference FOLDER_A FOLDER_B")
    if Path(flags.out).suffix != ".json" or not Path(flags.out).parent.is_dir():
        raise ValueError(f"--out {flags.out}: must be NAME.json in a folder that exists")
    picture = Path(flags.out).with_suffix(".png")
    if picture.exists() and not Path(flags.out).exists():
        raise ValueError(f"--out {flags.out}: {picture} would be overwritten; give another name")
    test = Test(*words, flags.out, flags.seed)
    test.write()
    for question, row in test.result().items():
        shares = [f"{kind} {100 * row[kind]:.1f} %" for kind in ("win", "draw", "lose") if kind in row]
        print(f"{question}: {', '.join([*shares, ''])}{row['answers']} of {test.settings['pairs']} answers")
    serve(PAGE, test.answer, flags.port)


if __name__ == "__main__":
    run_command(main)
