"""Pieces of compiled loops over Python's objects, in LLVM's assembly language."""

from collections.abc import Iterator, Sequence


def fetch(
    name: str,
    ahead: int,
    lines: Sequence[int],
    *,
    through: Sequence[int] = (),
    objects: str = "objects",
    index: str = "i",
) -> str:
    """Lines that fetch what will be looked at ``ahead`` rounds later, beside the address itself.

    Args:
        name: How their values are called.
        ahead: So many rounds.
        lines: The bytes, from that address, whose cache lines are fetched.
        through: The address stands in an object: there, and in what stands there, and so on.
        objects: The array of these objects, up to the place ``%last``.
        index: The place at work.
    """

    def text() -> Iterator[str]:
        yield f"%{name}.later = add i64 %{index}, {ahead}"
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
define private i1 @lies_as(
ptr %sizes.known, ptr %sizes, ptr %strides, i64 %dim, ptr %address.known, ptr %address,
i1 %learn, i1 %place
) {
%strides.known = getelementptr i64, ptr %sizes.known, i64 %dim
%sizes.are = call i1 @is_as(ptr %sizes.known, ptr %sizes, i64 %dim, i1 %learn)
%strides.are = call i1 @is_as(ptr %strides.known, ptr %strides, i64 %dim, i1 %learn)
%place.is = call i1 @is_as(ptr %address.known, ptr %address, i64 1, i1 %place)
%shape.is = and i1 %sizes.are, %strides.are
%all.is = and i1 %shape.is, %place.is
ret i1 %all.is
}
"""
"""Two functions: whether ``n`` words are as known, and whether an array's sizes, strides and
address are. They note them instead, if they are told to learn or to place."""
