"""Quality by likelihood: what is asked, and what the log-probabilities of a model say.

Nothing here knows HTTP or torch, so a model in process and one behind an endpoint are asked the same requests.

    items = load_items(("arc_easy",), tasks_dir, count=50, seed=0)        tasks.py
    scored = {item.key: [score(request) for request in item.requests]}    the caller's part
    answers = {item.key: answer(item, scored[item.key]) for item in items}   scoring.py
    summarize(answers), changes(base_answers, answers)                    results.py, by the statistics of arithmetic.py
"""
