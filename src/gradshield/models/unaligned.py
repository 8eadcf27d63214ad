"""The model that an aligned one was made from, and what its alignment changed."""

import torch

from gradshield.base.errors import UserError
from gradshield.models.load import Model, load_model
from gradshield.models.on_disk import EMBEDDED, EMBEDDED_BASE


def unaligned_name(model: Model, named: str | None = None) -> str:
    """The model before its alignment: the one named, the embedded one's, or the one below the adapters.

    Raises UserError where none is known.
    """
    below = EMBEDDED_BASE if model.name == EMBEDDED else model.name if model.adapters else None
    if not (named or below):
        raise UserError(
            f"{model.name}: the model before its alignment is not known; name it with the option base=FOLDER or Hub id"
        )
    return named or str(below)


def load_unaligned(model: Model, named: str | None = None) -> Model:
    """The model before its alignment, in CPU memory, in the precision of the aligned one.

    Raises UserError where its weights don't correspond to the aligned one's.
    """
    name = unaligned_name(model, named)
    base = load_model(name, device="cpu", dtype=str(model.net.dtype).removeprefix("torch."))
    shapes, others = ({n: tuple(w.shape) for n, w in m.weights.items()} for m in (model, base))
    wrong = next((n for n in shapes.keys() | others.keys() if shapes.get(n) != others.get(n)), None)
    if wrong:
        raise UserError(f"{name} is not the base of {model.name}: {wrong} differs in shape, or is in only one of them")
    if all(torch.equal(w.cpu(), base.weights[n]) for n, w in model.weights.items()):
        raise UserError(f"{name} has the same weights as {model.name}; name the model before its alignment")
    return base
