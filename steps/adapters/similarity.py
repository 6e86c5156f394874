"""Similarity of texts, by scikit-learn."""

from collections.abc import Sequence
from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.neighbors import NearestNeighbors


class TextIndex:
    """Texts among which the most similar one is found: cosine of TF-IDF weighted character n-grams (3 to 5)."""

    def __init__(self, texts: Sequence[str]) -> None:
        self._vectorizer = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True)
        vectors = self._vectorizer.fit_transform(texts)
        self._neighbors = NearestNeighbors(n_neighbors=1, metric="cosine").fit(vectors)

    def nearest(self, texts: Sequence[str]) -> tuple[Any, Any]:
        """Return, for each text, the similarity of the most similar text of the index, and its position."""
        distances, positions = self._neighbors.kneighbors(self._vectorizer.transform(texts))
        return 1 - distances[:, 0], positions[:, 0]
