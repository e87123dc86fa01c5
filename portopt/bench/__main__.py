"""``python -m portopt.bench SPEC``: the child for NumPy and JAX."""

import json
import sys

from portopt.bench.child import answer, jax_contenders, numpy_contenders

if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    contenders = {"numpy": numpy_contenders, "jax": jax_contenders}[spec["framework"]]
    answer(spec["framework"], contenders, spec)
