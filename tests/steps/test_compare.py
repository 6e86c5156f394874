from steps.compare import unseen_records


def test_a_champion_is_compared_on_records_whose_question_and_group_it_has_not_seen():
    trained_on = [
        {"instruction": "Capital?", "input": "France", "output": "Paris", "group": "france"},
        {"instruction": "Hello.", "input": "", "output": "Hello."},
    ]
    test = [
        {"instruction": "Capital?", "input": "France", "output": "Lyon"},  # the same question
        {"instruction": "River?", "input": "Paris", "output": "Seine", "group": "france"},
        {"instruction": "Capital?", "input": "Peru", "output": "Lima", "group": "peru"},
        {"instruction": "Goodbye.", "output": "Goodbye."},
    ]
    assert unseen_records(test, trained_on) == [2, 3]
