"""Print where a configuration lies: ``python -m alignguard.configs NAME``."""

import argparse

from alignguard.configs import NAMES, config_path

if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m alignguard.configs", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    print(config_path(parser.parse_args().name))
