"""The README's picture: which layers of a model gave up how much, from a project that has run.

python benchmarks/picture.py --to docs/kept.svg            # of this project
python benchmarks/picture.py --project FOLDER --to FILE.svg
"""

import argparse
from pathlib import Path

import pyarrow.parquet as pq

from fisherfold.page.layer_views import parameter_map
from fisherfold.page.page import stand_alone
from fisherfold.run.workspace import Workspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", type=Path, default=Path())
    parser.add_argument("--to", type=Path, required=True)
    options = parser.parse_args()
    rows = pq.read_table(Workspace(options.project).out("ranks") / "ranks.parquet").to_pylist()
    options.to.write_text(stand_alone(parameter_map(rows)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
