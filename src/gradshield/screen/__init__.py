"""From a file and a model to kept, quarantined and set-aside rows, and why. `gradshield.screen(rows)` calls
`gradshield.api.functions.screen`."""

from gradshield.base.callable_package import make_callable

make_callable(__name__, "gradshield.api.functions")
