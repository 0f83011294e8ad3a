"""Section of a run config: the file that a table's first values come from."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from shardemb.section import Section


class PretrainedConfig(Section):
    """Vectors that a table begins with; rows that the file does not have begin as ever."""

    path: str = Field(
        description="a file or URL: .parquet (or a folder of them), .safetensors, .npy, or text as "
        "word2vec and GloVe write it (.txt, .vec, also .gz)"
    )
    keys: Literal["rows", "vocabulary"] = Field(
        default="rows",
        description="rows: a vector is of the row that its integer key, or its place in a matrix, "
        "says; vocabulary: of the row that the feature's vocabulary has for its key",
    )
    key_column: str | None = Field(
        default=None, description="of Parquet files; default: `id`, or the only one that fits"
    )
    vectors: str | None = Field(
        default=None,
        description="column of Parquet files, or tensor of a safetensors file; default: the only "
        "one that fits",
    )
