"""Quality by likelihood: items become (context, continuation) requests, whoever runs a model scores them, and
arithmetic turns scores into results. Nothing here knows HTTP or torch, so an endpoint and a model in process can be
asked the same questions.

    items = load_items(("arc_easy",), tasks_dir, count=50, seed=0)        tasks.py
    scored = {item.key: [score(request) for request in item.requests]}    the caller's part
    answers = {item.key: answer(item, scored[item.key])}                  scoring.py
    summarize(answers), changes(idle, loaded)                             results.py, with arithmetic.py below them
"""
