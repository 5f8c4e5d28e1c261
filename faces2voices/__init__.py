"From a silent face to its voice."
__version__ = "0.1.0"

def __getattr__(name):
    "Import the system only when it is asked for, so that `import faces2voices` stays light."
    if name in ("FacesToVoices", "Speech"):
        from . import synthesis
        return getattr(synthesis, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
