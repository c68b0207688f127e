//! The Internet checksum (RFC 1071), as far as changing a field needs it (RFC 1624).

/// What a sum of 16-bit words changes by when some of them do: a ones' complement number of 32
/// bits that the kernel folds, as `bpf_csum_diff` would return it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Difference(u32);

impl Difference {
    /// Nothing changes.
    pub const NONE: Self = Self(0);

    /// When `old` becomes `new`: 32 bits of the packet, or 16 that begin at an even offset, read
    /// as a native integer.
    #[inline(always)]
    pub const fn of(old: u32, new: u32) -> Self {
        Self(!old).plus(Self(new))
    }

    /// Both changes.
    #[inline(always)]
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        let sum = self.0 as u64 + other.0 as u64;
        // At most one carry: it can't overflow again.
        Self((sum as u32) + (sum >> 32) as u32)
    }

    /// The change that undoes it: what a checksum field changes by when what it covers does.
    #[inline(always)]
    #[must_use]
    pub const fn negated(self) -> Self {
        Self(!self.0)
    }

    /// The checksum of data of which this is the sum, as it stands in the packet.
    #[inline(always)]
    pub const fn checksum(self) -> u16 {
        let sum = (self.0 & 0xffff) + (self.0 >> 16);
        !((sum & 0xffff) + (sum >> 16)) as u16
    }

    /// For the kernel's helpers.
    #[inline(always)]
    pub const fn get(self) -> u32 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::addr::{Address, Be128};

    /// RFC 1071, word by word.
    fn sum(bytes: &[u8]) -> u16 {
        let sum: u64 =
            bytes.chunks(2).map(|pair| u64::from(u16::from_ne_bytes([pair[0], pair[1]]))).sum();
        fold(sum)
    }

    fn fold(mut sum: u64) -> u16 {
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        sum as u16
    }

    /// Zero has two representations.
    fn is_same(a: u16, b: u16) -> bool {
        a % 0xffff == b % 0xffff
    }

    #[test]
    fn the_checksum_of_the_example_in_rfc_1071() {
        let words = [[0x00, 0x01, 0xf2, 0x03], [0xf4, 0xf5, 0xf6, 0xf7]].map(u32::from_ne_bytes);
        let sum = Difference::of(0, words[0]).plus(Difference::of(0, words[1]));
        assert_eq!(sum.checksum().to_ne_bytes(), (!0xddf2_u16).to_be_bytes());
    }

    proptest! {
        #[test]
        fn a_difference_is_what_the_sum_changes_by(
            old in any::<[u8; 16]>(),
            new in any::<[u8; 16]>(),
            rest in any::<[u8; 6]>(),
        ) {
            let before = sum(&[&old[..], &rest].concat());
            let after = sum(&[&new[..], &rest].concat());
            let (old, new): (Be128, Be128) = (bytemuck::cast(old), bytemuck::cast(new));
            let difference = old.difference(new);
            let predicted = fold(u64::from(before) + u64::from(difference.get()));
            prop_assert!(is_same(predicted, after));
            let undone = difference.plus(difference.negated());
            prop_assert!(is_same(fold(undone.get().into()), 0));
        }
    }
}
