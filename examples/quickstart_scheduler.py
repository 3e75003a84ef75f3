"""The scheduler in 20 lines: python examples/quickstart_scheduler.py (a table, and quickstart_scheduler.png)."""

import random
import time

import foveal

scheduler = foveal.Scheduler(max_in_flight=2, breadth=3.0)  # two workers; about three tasks share what is not the floor
for name, urgency in [("mail", 0.0), ("backup", -2.0), ("report", 1.0)]:
    scheduler.submit(time.sleep, random.uniform(0.01, 0.05), key=name, urgency=urgency, deadline=10.0)


def learn(budget: float) -> foveal.Step:
    """One part of a long task: says whether it is done, and how urgent the rest is."""
    time.sleep(0.01)
    return foveal.Step(done=random.random() < 0.1, feedback=random.gauss(0, 1), cost=1.0)


for i in range(4):
    scheduler.add_stepper(learn, key=f"learner {i}", importance=0.1 * i, max_steps=30)

print("of 100 turns:", scheduler.allocate(100))
scheduler.update("backup", urgency=3.0)  # a priority counts until the moment a task starts
report = scheduler.run(progress=True)
print(report)
try:
    report.plot("quickstart_scheduler.png")
    print("drawn: quickstart_scheduler.png")
except ImportError as error:
    print(f"no picture: {error}")
