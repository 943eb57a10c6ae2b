"""Another data set in the words of a pipeline: which of its rows to score, and what they show in the pipeline's classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medsd.data.dataset import DataInfo
from medsd.data.transforms import column, row_labels, stratified
from medsd.errors import InputError


def match_classes(theirs: Sequence[str], ours: Sequence[str], label_map: Sequence[str] = ()) -> dict[str, str]:
    """Class of the data set -> class of the pipeline, for those that have one: by `label_map` (`"THEIRS=OURS"`), else by name.

    Raises InputError for an entry that names an unknown class, and where no class is in common.
    """
    named = {}
    for entry in label_map:
        source, _, target = entry.partition("=")
        for name, known in ((source, theirs), (target, ours)):
            if name not in known:
                raise InputError(f'--label_map {entry}: there is no class "{name}" among {", ".join(known)}')
        named[source] = target
    matched = {name: named.get(name, name) for name in theirs if named.get(name, name) in ours}
    if theirs and not matched:
        raise InputError(
            f"the data has {', '.join(theirs)}, the pipeline knows {', '.join(ours)}: no class in common; say which is which with "
            "--label_map THEIRS=OURS"
        )
    return matched


def labels_in(pipeline: DataInfo, rows: Any, names: Sequence[str], label_map: Sequence[str] = ()) -> np.ndarray:
    """What rows with the classes `names` show, in the pipeline's order: class indices `(N,)`, -1 where that is not known; or findings
    `(N, K)` of 0 and 1, -1 for one that the data set does not know. All -1 for a pipeline without classes.

    Raises InputError as `match_classes` does.
    """
    labels, ours = row_labels(rows), pipeline.class_names
    if not ours:
        return np.full(len(rows), -1)
    matched = match_classes(names, ours, label_map)
    if labels.ndim == 1 and not pipeline.multi_label:
        order = [ours.index(matched[name]) if name in matched else -1 for name in names]
        return np.array([*order, -1])[labels]
    shown = labels if labels.ndim == 2 else np.where(labels[:, None] < 0, -1, np.arange(len(names)) == labels[:, None])
    findings = np.full((len(rows), len(ours)), -1)
    for theirs, target in matched.items():
        place = ours.index(target)
        findings[:, place] = np.maximum(findings[:, place], shown[:, list(names).index(theirs)])
    if pipeline.multi_label:
        return findings
    return np.where((findings == 1).sum(1) == 1, findings.argmax(1), -1)


def choose_rows(rows: Any, limit: int | None, seed: int, keys: Sequence[str] = ()) -> Any:
    """Rows by key: all, those of `keys`, or `limit` of them with the classes in proportion. Raises InputError for an unknown key."""
    place = {key: index for index, key in enumerate(column(rows, "key").to_pylist())}
    if missing := [key for key in keys if key not in place]:
        raise InputError(f"--keys {missing[0]}: no image of this split has that key")
    rows = rows.select([place[key] for key in dict.fromkeys(keys)]) if keys else rows
    return rows.select(stratified(row_labels(rows), column(rows, "key").to_pylist(), limit, seed))


def read_prior(file: Path, classes: Sequence[str]) -> np.ndarray:
    """Probability of each class, from YAML or JSON of CLASS: NUMBER; raises InputError where that does not fit."""
    import yaml

    if not file.is_file():
        raise InputError(f"--prior {file}: no such file; uniform, train, or a YAML file of CLASS: PROBABILITY is expected")
    try:
        given = {str(name): float(value) for name, value in yaml.safe_load(file.read_text()).items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise InputError(f"--prior {file} cannot be read: uniform, train, or a YAML file of CLASS: PROBABILITY is expected") from error
    if different := sorted(given.keys() ^ set(classes)):
        raise InputError(f'--prior {file}: "{different[0]}" is not in both the file and the pipeline, which knows {", ".join(classes)}')
    if not all(0 < value < np.inf for value in given.values()):
        raise InputError(f"--prior {file}: probabilities must be above 0; they are brought to a sum of 1")
    weights = np.array([given[name] for name in classes])
    return weights / weights.sum()
