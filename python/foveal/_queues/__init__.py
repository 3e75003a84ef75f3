"""What is behind :mod:`foveal.queues`: one module for each class, and what the two queues share."""
