"""Print the plugin's file, for ``--external_plugins``."""

from pathlib import Path

if __name__ == "__main__":
    print(Path(__file__).parent / "plugin" / "alignguard_plugin.py")
