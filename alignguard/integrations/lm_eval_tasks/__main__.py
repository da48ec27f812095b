"""Print where the task files lie, for ``--include_path``."""

from alignguard.integrations.lm_eval_tasks import FOLDER

if __name__ == "__main__":
    print(FOLDER)
