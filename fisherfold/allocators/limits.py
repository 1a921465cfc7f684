"""Which ranks a site may have: multiples, floors, ceilings, fixed ranks, and what stays dense.

A pattern (shell wildcards, case matters) is for every site that has a module of such a name.
"""

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fisherfold.network.sites import Site
from fisherfold.run.errors import ParameterError
from fisherfold.run.params import RanksParams


@dataclass(frozen=True)
class Limits:
    """The limits of all sites; k is a site's full rank.

    Attributes:
        round_to: a rank below k is a multiple of this.
        floor, ceiling: least and largest rank as a share of k, one for all or by pattern (of several, the strictest holds). A
            ceiling below 1 also rules out staying dense.
        fixed: ranks by pattern, whatever `round_to`, `floor` and `ceiling` say.
        exclude: patterns of what stays dense; it counts, so the others give up more.
        untargeted: linear layers that stay dense anyway and do not count, by name, and why.
    """

    round_to: int = 1
    floor: float | Mapping[str, float] = 0.0
    ceiling: float | Mapping[str, float] = 1.0
    fixed: Mapping[str, int] = field(default_factory=dict)
    exclude: Sequence[str] = ()
    untargeted: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, params: RanksParams, dense: Iterable[str] = (), untargeted: Mapping[str, str] | None = None
    ) -> "Limits":
        """Those of the stage's parameters; the modules `dense` are excluded as well."""
        excluded = [*params.exclude, *dense]
        return cls(params.round_to, params.floor, params.ceiling, params.fixed, excluded, untargeted or {})

    def allowed(self, site: Site) -> np.ndarray:
        """Whether each rank 0 … k is allowed, bool [k + 1]. Rank k is the dense site."""
        full = site.full_rank
        ranks = np.arange(full + 1)
        if matches(site, self.exclude):
            return ranks == full
        if fixed := _values(self.fixed, site):
            return (ranks == fixed[0]) & (len(set(fixed)) == 1)
        multiples = (ranks % self.round_to == 0) | (ranks == full)
        floor, ceiling = max([0.0, *_values(self.floor, site)]), min([1.0, *_values(self.ceiling, site)])
        return multiples & (ranks >= floor * full) & (ranks <= ceiling * full)

    def check_patterns(self, sites: Sequence[Site]) -> None:
        """Raise ParameterError for a pattern that matches no module, or gives a rank to one that stays dense anyway."""
        names = [layer.name for site in sites for layer in site.layers]
        for key in ("exclude", "fixed", "floor", "ceiling"):
            value = getattr(self, key)
            for pattern in value if not isinstance(value, float | int) else ():
                if fnmatch.filter(names, pattern):
                    continue
                untargeted = fnmatch.filter(self.untargeted, pattern)
                if untargeted and key == "exclude":
                    continue
                known = f"; {untargeted[0]!r} stays dense: {self.untargeted[untargeted[0]]}" if untargeted else ""
                raise ParameterError(
                    f"ranks.{key}: {pattern!r} matches none of the {len(names)} targeted modules, such as {names[0]!r}{known}."
                )


def matches(site: Site, patterns: Iterable[str]) -> bool:
    """Whether a module of the site matches one of `patterns`."""
    return any(fnmatch.fnmatchcase(layer.name, pattern) for pattern in patterns for layer in site.layers)


def _values(limit: float | Mapping[str, float], site: Site) -> list[float]:
    """The values of a limit that hold for a site."""
    if not isinstance(limit, Mapping):
        return [limit]
    return [value for pattern, value in limit.items() if matches(site, [pattern])]
