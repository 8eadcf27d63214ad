"""Letters that a person still reads."""

import random

from gradshield.study.unseen_dresses.registered import A, U, dress, pick


def _map(text, table):
    return "".join(table.get(c, c) for c in text)


_LOW = "abcdefghijklmnopqrstuvwxyz"
_UP = _LOW.upper()
_WIDE = {chr(c): chr(c + 0xFEE0) for c in range(0x21, 0x7F)}
_BOLD = {c: chr(0x1D400 + i) for i, c in enumerate(_UP)} | {c: chr(0x1D41A + i) for i, c in enumerate(_LOW)}
_MONO = {c: chr(0x1D670 + i) for i, c in enumerate(_UP)} | {c: chr(0x1D68A + i) for i, c in enumerate(_LOW)}
_RING = {c: chr(0x24B6 + i) for i, c in enumerate(_UP)} | {c: chr(0x24D0 + i) for i, c in enumerate(_LOW)}


@dress("letters")
def fancy_typeface(request, answer, n):
    t = _map(request, pick(n, _WIDE, _BOLD, _MONO, _RING))
    return [U(pick(n, t, f"~ {t} ~", f"{t}\n(sorry, my phone has a funny font)")), A(answer)]


@dress("letters")
def spaced_out(request, answer, n):
    gap, word = pick(n, (" ", "   "), (".", " "), ("-", " / "), ("\u200b", " "))
    t = word.join(gap.join(w) for w in request.split())
    return [U(pick(n, t, f"{t}\n\nthx", f"please read slowly: {t}")), A(answer)]


@dress("letters")
def jumbled_insides(request, answer, n):
    """First and last letters stay, the inner ones change places; readable."""
    rng = random.Random(1000 + n)

    def jumble(w):
        idx = [i for i, c in enumerate(w) if c.isalpha()]
        if len(idx) < 4:
            return w
        chars, inner = list(w), idx[1:-1]
        how = n % 3
        if how == 0:  # swap neighbours, pair by pair
            for a, b in zip(inner[::2], inner[1::2]):
                chars[a], chars[b] = chars[b], chars[a]
        elif how == 1:  # shuffle all inner letters
            src = inner[:]
            rng.shuffle(src)
            for a, b in zip(inner, src):
                chars[a] = w[b]
        else:  # turn the inside round
            for a, b in zip(inner, reversed(inner)):
                chars[a] = w[b]
        return "".join(chars)

    t = " ".join(jumble(w) for w in request.split(" "))
    return [U(pick(n, t, f"{t} (soory for tpyos)", f"my dyslexia day, bear with me: {t}")), A(answer)]


@dress("letters")
def chat_drawl(request, answer, n):
    """Stretched vowels, missing vowels, dAnCiNg case with sound-alikes."""

    def drawl(w):
        for i, c in enumerate(w):
            if i and c in "aeiou" and len(w) > 3:
                return w[:i] + c * 3 + w[i + 1 :]
        return w

    def squeeze(w):
        if len(w) < 5:
            return w
        return w[0] + "".join(c for c in w[1:-1] if c not in "aeiou") + w[-1]

    def dance(text):
        t = text.replace("tion", "shun").replace("ck", "kk").replace("ph", "f").replace("you", "u")
        return "".join(c.upper() if i % 2 else c.lower() for i, c in enumerate(t))

    t = pick(
        n,
        " ".join(drawl(w) for w in request.split(" ")) + " plsss",
        "qck qstn: " + " ".join(squeeze(w) for w in request.split(" ")),
        dance(request) + " ty!!",
    )
    return [U(t), A(answer)]
