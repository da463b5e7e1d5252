"""Which attentions of a model are swapped: rules by module path and length."""

import dataclasses
import fnmatch

from jax_sage import kernels
from jax_sage.recipe import Recipe, resolve

# Queries and keys from which jax_sage is faster than what Flax models have, XLA's attention, by
# compute capability. H200: 4.5 times at 1024, the shortest that was measured (benchmarks/records).
# Models that ask for cuDNN's, which is faster at 1024 if causal and slower from 4096 on, need
# another rule.
_MIN_LENGTH = {90: 1024}
_MIN_LENGTH_ELSEWHERE = 1024  # on GPUs that were not measured


@dataclasses.dataclass(frozen=True)
class Rule:
    """What happens to the attentions that it applies to.

    Attributes:
      path: pattern of the module path, with ``*`` and ``?`` as in file names; ``*`` also matches
        ``/``. Paths are ``"encoder/layers/0/attention"``; under :func:`jax_sage.patch`, where no
        module is known, the place of the call: ``"models/dit.py:88 (Block.__call__)"``, in a
        notebook ``"cell 3, line 2 (attend)"``.
      min_length: applies only where there are at least so many queries and keys. None: where it
        pays on this device, from 1024 on a GPU (against XLA's attention, which models have unless
        they ask for cuDNN's: against that from 4096); from 1 elsewhere, where it is not about
        speed.
      recipe: the recipe of :func:`jax_sage.attention`.
      off: keep the exact attention.
      causal: the mask that these attentions are given is the causal mask, and nothing else. It is
        replaced by ``is_causal=True``, so that what it hides is not computed. A mask whose values
        are known is checked; that of a jit-compiled function is not: the user vouches for it.
    """

    path: str = "*"
    min_length: int | None = None
    recipe: str | Recipe = "8+8"
    off: bool = False
    causal: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            raise TypeError(f"Rule.path is {self.path!r}; it must be a str, a pattern of paths.")
        resolve(self.recipe)
        for name in ("off", "causal"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Rule.{name} is {getattr(self, name)!r}; it must be a bool.")
        length = self.min_length
        if length is not None and (not isinstance(length, int) or length < 0):
            raise ValueError(
                f"Rule.min_length is {length!r}; it must be an int from 0 on, or None."
            )


@dataclasses.dataclass(frozen=True)
class Policy:
    """Which attentions are swapped, and how. Frozen and hashable: a part of jit's cache key.

    Attributes:
      rules: the first that applies decides. Where none does, the exact attention is kept.
      on_unsupported: what happens where a rule wants a swap that cannot be done (active dropout,
        attention weights that are stored, a dtype without a kernel, ...). ``"fallback"``: the exact
        attention is kept, and the reason is in the report, or a warning where there is none.
        ``"error"``: :class:`jax_sage.UnsupportedAttentionError` is raised.
    """

    rules: tuple[Rule, ...] = (Rule(),)
    on_unsupported: str = "fallback"

    def __post_init__(self) -> None:
        rules = self.rules if isinstance(self.rules, tuple | list) else (self.rules,)
        if not all(isinstance(rule, Rule) for rule in rules):
            raise TypeError(f"Policy.rules is {self.rules!r}; it must be jax_sage.Rule objects.")
        object.__setattr__(self, "rules", tuple(rules))
        if self.on_unsupported not in ("fallback", "error"):
            raise ValueError(
                f"Policy.on_unsupported is {self.on_unsupported!r}; allowed: 'fallback', 'error'."
            )

    def find(self, path: str, length: int) -> tuple[Rule | None, str]:
        """The rule that decides, or why there is none; `length` is of queries or keys."""
        why = "no rule has this path"
        for rule in self.rules:
            if not fnmatch.fnmatchcase(path, rule.path):
                continue
            shortest = default_min_length() if rule.min_length is None else rule.min_length
            if length >= shortest:
                return rule, ""
            why = f"length {length} is below {shortest}, from where on it pays"
            if rule.min_length is not None:
                why = f"length {length} is below the rule's {shortest}"
        return None, why


def default_min_length() -> int:
    """Queries and keys from which a swap pays on this process's GPUs; 1 without one."""
    capabilities = kernels.capabilities()
    if not capabilities:
        return 1
    return max(_MIN_LENGTH.get(c, _MIN_LENGTH_ELSEWHERE) for c in capabilities)
