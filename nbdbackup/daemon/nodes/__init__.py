"""The block graph: nodes by name, which is made of which, and who writes where.

- `table`: the nodes and their children; nothing is known here of how they are opened.
- `opening`: from a definition (`monitor/services_graph.py`) to a node, for each driver.
- `writers`: who may write to what; refuses what would let a point in time be written past.

A node whose device is another node as it is (raw without offset and size, copy-before-write) is a second
name for that one. What has to see every write, a copy-before-write filter above all, is put on the *slot*
at the bottom of such a row of names: there it sees the writes of all of them, those of exports that
were there before included.
"""
