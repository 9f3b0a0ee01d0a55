"""Define a selector: it keeps, of a decoded clip, the frames that the question is about."""

from __future__ import annotations

from avllm.data.media.load import Clip


class Selector:
    """Choose frames or sound of a clip by the question (LSTP, arXiv 2402.16050, chooses frames).

    A selector runs where clips are decoded, in loader workers too: it has to be picklable, and
    small. Its choice depends on the question, so nothing that it chose is cached or shared between
    questions.
    """

    def select(self, clip: Clip, question: str) -> Clip:
        """Return the clip with fewer frames (or less sound); their seconds stay those of the clip.

        Args:
            clip: as decoded. question: the text of the last question; empty where nothing is asked.
        """
        raise NotImplementedError(f"{type(self).__name__}.select")
