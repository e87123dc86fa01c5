"""Pieces of compiled loops over Python's objects, in LLVM's assembly language."""

from collections.abc import Iterator, Sequence


def fetch(
    name: str,
    ahead: int,
    lines: Sequence[int],
    *,
    through: Sequence[int] = (),
    objects: str = "objects",
) -> str:
    """Lines that fetch what will be looked at ``ahead`` rounds later, beside the address itself.

    Args:
        name: How their values are called.
        ahead: So many rounds.
        lines: The bytes, from that address, whose cache lines are fetched.
        through: The address stands in an object: there, and in what stands there, and so on.
        objects: The array of these objects.
    """

    def text() -> Iterator[str]:
        yield f"%{name}.later = add i64 %i, {ahead}"
        yield f"%{name}.i = call i64 @llvm.umin.i64(i64 %{name}.later, i64 %last)"
        yield f"%{name}.in = getelementptr ptr, ptr %{objects}, i64 %{name}.i"
        yield f"%{name}.0 = load ptr, ptr %{name}.in"
        for step, offset in enumerate(through):
            yield f"%{name}.{step}.in = getelementptr i8, ptr %{name}.{step}, i64 {offset}"
            yield f"%{name}.{step + 1} = load ptr, ptr %{name}.{step}.in"
        for line in lines:
            yield f"%{name}.at.{line} = getelementptr i8, ptr %{name}.{len(through)}, i64 {line}"
            yield f"call void @llvm.prefetch.p0(ptr %{name}.at.{line}, i32 0, i32 3, i32 1)"

    return "\n".join([*text(), ""])


COMPARE = """\
define private i1 @is_as(ptr %known, ptr %found, i64 %n, i1 %learn) {
br label %next
next:
%i = phi i64 [0, %0], [%i.next, %same]
%more = icmp ult i64 %i, %n
br i1 %more, label %look, label %done
look:
%known.at = getelementptr i64, ptr %known, i64 %i
%found.at = getelementptr i64, ptr %found, i64 %i
%word = load i64, ptr %found.at
br i1 %learn, label %note, label %compare
note:
store i64 %word, ptr %known.at
br label %same
compare:
%wanted = load i64, ptr %known.at
%is = icmp eq i64 %word, %wanted
br i1 %is, label %same, label %done
same:
%i.next = add i64 %i, 1
br label %next
done:
%all = icmp eq i64 %i, %n
ret i1 %all
}
"""
"""A function that says whether ``n`` words are as known; or notes them, if told to learn."""
