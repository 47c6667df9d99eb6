def slow_in_loops(closed): return False
