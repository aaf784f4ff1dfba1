"""Search for the settings of a head: Optuna's trials over a project's own folds."""
