"""The papers behind each method, by the name that params.yaml gives it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """A paper: authors and year, title, where it appeared, and where it can be read."""

    authors: str
    title: str
    where: str
    address: str


def _arxiv(authors: str, title: str, number: str) -> Reference:
    return Reference(authors, title, f"arXiv {number}", f"https://arxiv.org/abs/{number}")


FWSVD = _arxiv("Hsu et al. 2022", "Language model compression with weighted low-rank factorization", "2207.00112")
ASVD = _arxiv(
    "Yuan et al. 2023",
    "ASVD: Activation-aware singular value decomposition for compressing large language models",
    "2312.05821",
)
SVD_LLM = _arxiv(
    "Wang et al. 2024",
    "SVD-LLM: Truncation-aware singular value decomposition for large language model compression",
    "2403.07378",
)
SVD_LLM_2 = _arxiv(
    "Wang et al. 2025",
    "SVD-LLM V2: Optimizing singular value truncation for large language model compression",
    "2503.12340",
)
KFAC = _arxiv(
    "Martens and Grosse 2015", "Optimizing neural networks with Kronecker-factored approximate curvature", "1503.05671"
)
LEMS = Reference(
    "Thoma et al. 2026",
    "Advancing SVD-based LLM compression via layer-wise error model search",
    "ICML 2026",
    "https://lems-svd.github.io/",
)
GFWSVD = _arxiv(
    "Chekalina et al. 2025",
    "Generalized Fisher-Weighted SVD: Scalable Kronecker-factored Fisher approximation for compressing large language models",
    "2505.17974",
)
FERMIGRAD = _arxiv(
    "Rausch et al. 2025",
    "Globally optimized SVD compression of LLMs via Fermi-function-based rank selection and gauge fixing",
    "2512.03062",
)
PIFA = _arxiv(
    "Zhao et al. 2025",
    "Pivoting factorization: A compact meta low-rank representation of sparsity for efficient inference in large language models",
    "2501.19090",
)
REAP = _arxiv("Lasby et al. 2025", "REAP the experts: Why pruning prevails for one-shot MoE compression", "2510.13999")
REFERENCES: dict[str, tuple[Reference, ...]] = {
    "fwsvd": (FWSVD,),
    "asvd": (ASVD,),
    "svd_llm": (SVD_LLM, SVD_LLM_2),
    "kfac": (KFAC, LEMS),
    "gfwsvd": (GFWSVD,),
    "sequence": (GFWSVD,),
    "sensitivity": (ASVD,),
    "fermigrad": (FERMIGRAD,),
    "ilp": (LEMS,),
    "drop_experts": (REAP,),
    "pivoted": (FERMIGRAD, PIFA),
    "pivoted_outputs": (FERMIGRAD, PIFA),
    "pivoted_inputs": (FERMIGRAD, PIFA),
}
"""Metrics, estimators, allocators and storage formats; one that is absent needs no paper or is this project's own."""
