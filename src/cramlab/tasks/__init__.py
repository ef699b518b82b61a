"""Tasks: configs that draw data from a seed. They know no model.

To add a task, write one file with a config that satisfies `cramlab.tasks.task.Task`; `copying` is a short example.
An experiment in `cramlab.experiments` puts it into a `RunConfig`, which trains and reports it. `cramlab eval` and
`cramlab cost` open runs of SRCD alone so far.

- `task`: the contract, and the stream of batches that every task shares.
- `srcd`: Sparse Retrieval in Continuous Dynamics; `srcd_oracles`: its best scores and floors; `export`: its files.
- `copying`, `relabelling`: transfer tasks with SRCD's inputs and answers.
- `irregular`: real irregular time series.
"""
