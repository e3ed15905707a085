"""Admission: the request queue, ledgers of requests and token work in flight, leases, retry budgets."""
