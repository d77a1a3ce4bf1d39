"""The oracle: the same QMP script for qemu-storage-daemon and for `nbdbackup serve`, compared step by step.

A script is an async function of a `Both`:

    @script()
    async def test_full_backup(both: Both) -> None:
        await both.disk("disk", MIB, "write -P 1 0 64k")
        await both.disk("target", MIB)
        await both.run("blockdev-backup", device="disk", target="target", sync="full", job_id="j")
        await both.wait("j", "null")
        await both.same_file("target.img")

Every step runs on both sides at once, and what comes of it is compared: what a command returns, the class
and text of its error, the bytes of files, the extents of bitmaps as an NBD client sees them; at the
end, for every job, its events in their order. Events of different jobs are not compared with each other.

    side.py          one daemon: its process, its control socket, what it has said
    both.py          the steps
    script.py        `@script`: who the reference is, and what waits for a feature that is not there yet
    lives.py         a job's events, put in a form that can be compared
    reading.py       the same for what programs say
    masks.py         what is not compared, and why
    differences.py   where we differ on purpose, and why

Rule: a script may say what it expects (`run`: both accept, `fail`: both refuse), so that it cannot
go astray on both sides alike; texts and values come from the reference alone.
"""
