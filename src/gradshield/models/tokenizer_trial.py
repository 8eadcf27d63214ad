"""Run as a script, in a process of its own: does a tokenizer tokenise, does a chat template render, and do they end?

Neither can be stopped from inside once it runs, so another process watches this one. It imports nothing of ours, which
keeps it quick. Input, as JSON on stdin: {"tokenizer": path or null, "templates": [text, ...], "variables": {...}}.
Output, one JSON line for each: {"stage": "tokenizer" or "template", "error": null or one line}.
"""

import json
import re
import sys
from datetime import datetime
from typing import Any

LIMIT = 5  # seconds of computing; common tokenizers and templates take 0.3
MEMORY = 2 * 2**30  # bytes
QUESTION, ANSWER = "Where is it?", "Over there."


def hard_texts(patterns: list[str]) -> list[str]:
    """Texts on which regular expressions that backtrack do so: runs of one character or of the patterns' own
    characters and words, then something else."""
    whole = " ".join(patterns)
    words = set(re.findall(r"[^\W_]{2,}", whole))
    own = {chr(int(code, 16)) for code in re.findall(r"\\u([0-9a-fA-F]{4})", whole)} | set(
        re.findall(r"[^\0-~]", whole)
    )
    own = {each for each in own if not "\ud800" <= each <= "\udfff"}
    others = {"\n", "\t", *"éÉяЖωΩאعकกあア中한²😀", *sorted(own)[:500]}
    runs = [character * 40 for character in (*map(chr, range(32, 127)), *sorted(others))]
    mixed = ["word " * 100, "ab" * 150, "a1" * 150, "1,000 " * 50, "  \n" * 100, "aA" * 150, "".join(words) * 40]
    return [QUESTION, ANSWER, *(run + end for run in (*runs, *mixed, *(w * 40 for w in words)) for end in ("!", "\0"))]


def try_tokenizer(path: str) -> None:
    from tokenizers import Tokenizer

    with open(path, encoding="utf-8") as file:
        patterns = re.findall(r'"Regex":\s*"((?:[^"\\]|\\.)*)"', file.read())
    tokenizer = Tokenizer.from_file(path)
    for text in hard_texts(patterns):
        tokenizer.encode(text)


def try_template(template: str, variables: dict[str, Any]) -> None:
    """Renders one exchange as chat templates are rendered by transformers; refusing it is no failure."""
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

        def _same(self, caller: Any) -> str:
            return caller()

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **_: json.dumps(value)
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    tree = environment.parse(template)
    filters = list(tree.find_all(nodes.Filter))
    used = {each.name for each in filters}
    used |= {text.value for each in filters if each.name == "map" for text in each.find_all(nodes.Const)}
    used |= {each.name for each in tree.find_all(nodes.Name) if each.name == "lipsum"}
    if drawn := used & {"random", "lipsum"}:
        raise jinja2.TemplateError(f"it draws at random ({drawn.pop()}), so a row never reads the same; remove that")
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    compiled = environment.from_string(template)
    for messages in (turns[:1], turns, turns * 3, parts, [{"role": "system", "content": "Be kind."}, *turns]):
        for prompt in (True, False):
            try:
                compiled.render(messages=messages, add_generation_prompt=prompt, **variables)
            except (MemoryError, RecursionError):
                raise
            except Exception:  # the template's own business: it refuses, or takes another form of content
                pass


def main() -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    job = json.load(sys.stdin)
    todo: list[tuple[str, Any]] = [("tokenizer", job["tokenizer"])] if job["tokenizer"] else []
    for stage, what in [*todo, *(("template", each) for each in job["templates"])]:
        try:
            try_tokenizer(what) if stage == "tokenizer" else try_template(what, job["variables"])
            error = None
        except BaseException as caught:  # a panic in tokenizers is no Exception
            error = f"{type(caught).__name__}: {caught}".splitlines()[0][:300].rstrip(": ")
        print(json.dumps({"stage": stage, "error": error}), flush=True)


if __name__ == "__main__":
    main()
