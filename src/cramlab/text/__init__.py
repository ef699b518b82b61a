"""Text as documents: what `--text` of every command and `text` in Python stand for.

`sources` says which files, folders, data sets or packaged texts a name stands for, `files` reads one file in its form,
`records` takes the text out of records (JSON, Parquet, Arrow), `datasets` reads data sets that the library datasets
saved or the hub holds, `packaged` has the texts that come with Python. All of them make a `corpus`.
"""

from cramlab.text.corpus import Corpus, Document
from cramlab.text.sources import corpus_of, read_corpus

__all__ = ["Corpus", "Document", "corpus_of", "read_corpus"]
