"""Tasks: configs that draw data from a seed. They know no model.

To add a task, write one file with a config that satisfies `cramlab.tasks.task.Task`; `copying` is a short example.
`cramlab run FILE.py:CLASS` trains it, and `cramlab eval`, `cost` and `report` open its runs.

- `task`: the contract, and the stream of batches that every task shares; `check`: whether a task keeps it.
- `srcd`: Sparse Retrieval in Continuous Dynamics; `srcd_oracles`: its best scores and floors; `export`: its files.
- `changing`: SRCD in which patterns change at a known time.
- `mqar`: multi-query associative recall.
- `copying`, `relabelling`: transfer tasks with SRCD's inputs and answers.
- `irregular`: real irregular time series.
"""
