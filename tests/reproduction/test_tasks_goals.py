from reproduction import goals, tasks_goals


def test_the_goals_of_tasks_are_those_that_their_command_writes():
    assert goals.read(tasks_goals.TOPIC) == tasks_goals.found()
