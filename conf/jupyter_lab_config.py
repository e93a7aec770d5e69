"""Settings of JupyterLab for `make lab`: it contacts no other machine."""

c = get_config()  # noqa: F821  (Jupyter defines it)


def without_news(handler, page_config: dict) -> dict:
    """Do not ask whether to fetch news either."""
    page_config["disabledExtensions"] = [
        *page_config["disabledExtensions"],
        "@jupyterlab/apputils-extension:announcements",
    ]
    return page_config


c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
c.LabApp.extension_manager = "readonly"  # the default one searches pypi.org
c.ServerApp.tornado_settings = {"page_config_hook": without_news}

# Without this every kernel warns that it talks to JupyterLab in plain text.
c.KernelManager.transport_encryption = "auto"
