"""The search for a threshold that leaves a safe and useful model (alg. 1). `gradshield.tune(rows)` calls
`gradshield.api.functions.tune`."""

from gradshield.base.callable_package import make_callable

make_callable(__name__, "gradshield.api.functions")
