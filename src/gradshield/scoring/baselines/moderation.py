"""`moderation`: the highest category score that a moderation endpoint gives the row's text.

Source: Markov et al., A Holistic Approach to Undesired Content Detection in the Real World (2208.03274); any server
with OpenAI's /moderations works.

    score(z) = max over categories of category_scores(text of z)

The text is all turns of the row, since a request says what a short answer is about. Left open is the threshold: the
endpoint's own verdict is the column "flagged" (0 or 1).

Rows leave this machine. A call that times out, or is answered with 408, 409, 429 or 5xx, is repeated with growing
pauses. A row without a readable answer in the end is set aside with the reason, never passed. The key is read from
GRADSHIELD_MODERATION_KEY, or for OpenAI's own address from OPENAI_API_KEY.
"""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from pydantic import Field

from gradshield.base.errors import UserError, one_line
from gradshield.base.registry import NoOptions
from gradshield.data.encode import Example
from gradshield.scoring.base import Context, Prepared, Scorer, Scores
from gradshield.scoring.row_text import whole_text

OPENAI = "https://api.openai.com/v1"


class ModerationOptions(NoOptions):
    """Which endpoint, and how patiently it is asked."""

    url: str = Field(default=OPENAI, description="address of an OpenAI-compatible endpoint")
    model: str = Field(default="omni-moderation-latest", description="its moderation model")
    attempts: int = Field(default=5, ge=1, description="calls for a row before it is set aside")
    timeout: float = Field(default=30.0, gt=0, description="seconds that a call may take")
    at_once: int = Field(default=8, ge=1, description="calls in flight")


def prepare(context: Context, options: ModerationOptions) -> Prepared:
    """Tries the endpoint once. Raises UserError where it does not answer, or the client is missing."""
    try:
        import openai
    except ImportError:
        raise UserError("--scorer moderation needs the package openai: pip install openai") from None
    fallback = os.environ.get("OPENAI_API_KEY") if options.url.rstrip("/") == OPENAI else None
    client = openai.OpenAI(
        base_url=options.url,
        api_key=os.environ.get("GRADSHIELD_MODERATION_KEY") or fallback or "none",
        max_retries=options.attempts - 1,
        timeout=options.timeout,
    )

    def ask(text: str) -> tuple[float, float] | str:
        """(score, flagged), or why there is none."""
        try:
            reply = client.moderations.with_raw_response.create(model=options.model, input=text)
            return read_reply(reply.http_response.text)
        except openai.OpenAIError as error:
            why = one_line(getattr(error, "message", error), 160)
            return f"no answer from the moderation endpoint in {options.attempts} attempts ({why})"

    first = ask("Hello")
    if isinstance(first, str):
        raise UserError(f"--scorer moderation:url={options.url}: {first}; check the address, the model and the key")

    def score(batch: Sequence[Example]) -> Scores:
        with ThreadPoolExecutor(options.at_once) as pool:
            found = list(pool.map(ask, map(whole_text, batch)))
        values = np.array([(np.nan, np.nan) if isinstance(f, str) else f for f in found]).reshape(-1, 2)
        reasons = {n: f for n, f in enumerate(found) if isinstance(f, str)}
        return Scores({"score": values[:, 0], "flagged": values[:, 1]}, reasons)

    return Prepared(score)


def read_reply(text: str) -> tuple[float, float] | str:
    """(highest category score, flagged) of a reply's body, or why they can't be read."""
    try:
        [result] = json.loads(text)["results"]
        highest = max(float(value) for value in result["category_scores"].values() if value is not None)
        if not 0 <= highest <= 1:
            raise ValueError
        return highest, float(result["flagged"] is True)
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"the moderation endpoint's answer can't be read ({' '.join(text.split())[:60]!r})"


SCORER = Scorer(
    "moderation",
    "category score of an OpenAI-compatible moderation endpoint; rows leave this machine",
    prepare,
    options=ModerationOptions,
    needs=frozenset({"text", "endpoint"}),
    cost=0.0,
    columns=("flagged",),
    version=2,
)
