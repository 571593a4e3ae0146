"""``python -m fpn_engine``: the same as ``fpn-engine``."""

from fpn_engine.cli import main

if __name__ == "__main__":
    main()
