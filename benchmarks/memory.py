"""How much memory a process holds."""

import psutil


def memory(process: psutil.Process | None = None) -> dict[str, float]:
    """GiB that a process holds: resident in all, and anonymous: without pages of files, which the system can drop."""
    info = (process or psutil.Process()).memory_info()
    return {"resident": info.rss / 2**30, "anonymous": (info.rss - info.shared) / 2**30}
