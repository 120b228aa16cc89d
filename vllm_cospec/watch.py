"""What a server does about drift: say so, or verify strictly, until it is started again or for a number of requests."""

from __future__ import annotations

from vllm.logger import init_logger

from vllm_cospec.config import Settings
from vllm_cospec.drift import DriftDetector, Finished

logger = init_logger("vllm.cospec")


class Watch:
    """The drift test over one engine's requests, and what its alarm leads to."""

    def __init__(self, settings: Settings):
        """Begin with what calibration saw.

        Args:
            settings: with ``traffic``.
        """
        assert settings.traffic is not None
        self._detector = DriftDetector(settings.traffic)
        self._falls_back, self._pause = settings.on_drift == "strict", settings.drift_pause
        self._left = 0  # requests until arbitration comes back
        self.strict = False
        """Whether verification is strict now."""

    def finished(self, request: Finished | None) -> None:
        """Take in a request that has ended.

        Args:
            request: what was counted of it; None where it had settings of its own, or was verified strictly in part.
        """
        if self.strict:
            self._left -= 1
            if self._pause is not None and self._left <= 0:
                self.strict = False
                self._detector.reset()
                logger.warning("CoSpec: requests are arbitrated again, and watched from here on.")
            return
        if request is None or self._detector.alarm or not self._detector.add(request):
            return
        self.strict = self._falls_back
        self._left = self._pause or 0
        what = "go on being arbitrated (on_drift='log')"
        if self.strict:
            back = "the server is started again" if self._pause is None else f"{self._pause} of them have ended"
            what = f"are verified strictly until {back}"
        logger.warning(
            "CoSpec: traffic is not what the arbiter was calibrated on (%s, noticed after %d requests); requests %s.",
            self._detector.reason(), self._detector.requests, what,
        )  # fmt: skip
