//! A packet's bytes where they lie: no call, no copy.
//!
//! Numbers stand on no boundary there, so the compiler would take them apart and put them together
//! byte by byte. The kernel's own compiler knows better what the machine can do, so it is told what
//! to do word by word.

use core::arch::asm;

use aya_ebpf::programs::TcContext;
use bytemuck::Pod;

/// Bytes of a packet that are known to be there.
#[derive(Clone, Copy)]
pub(crate) struct Bytes(usize);

impl Bytes {
    /// The packet, if its first `length` bytes lie in one piece. Until the next call into the kernel
    /// that writes to it.
    #[inline(always)]
    pub(crate) fn of(ctx: &TcContext, length: usize) -> Option<Self> {
        let start = ctx.data();
        if start + length > ctx.data_end() { None } else { Some(Self(start)) }
    }

    /// What begins at `offset`.
    #[inline(always)]
    pub(crate) fn at(self, offset: usize) -> Self {
        Self(self.0 + offset)
    }

    /// 8 bits.
    #[inline(always)]
    pub(crate) fn byte(self, offset: usize) -> u8 {
        let value: u64;
        let at = self.0 + offset;
        // SAFETY: the verifier sees to it that nothing is read but the packet.
        unsafe {
            asm!("{0} = *(u8 *)({1} + 0)", out(reg) value, in(reg) at, options(readonly, nostack));
        };
        value as u8
    }

    /// 16 bits as a native integer.
    #[inline(always)]
    pub(crate) fn half(self, offset: usize) -> u16 {
        let value: u64;
        let at = self.0 + offset;
        // SAFETY: as in `byte`.
        unsafe {
            asm!("{0} = *(u16 *)({1} + 0)", out(reg) value, in(reg) at, options(readonly, nostack));
        };
        value as u16
    }

    /// 32 bits as a native integer.
    #[inline(always)]
    pub(crate) fn word(self, offset: usize) -> u32 {
        let value: u64;
        let at = self.0 + offset;
        // SAFETY: as in `byte`.
        unsafe {
            asm!("{0} = *(u32 *)({1} + 0)", out(reg) value, in(reg) at, options(readonly, nostack));
        };
        value as u32
    }

    /// Writes 32 bits from a native integer.
    #[inline(always)]
    pub(crate) fn set_word(self, offset: usize, value: u32) {
        let (at, value) = (self.0 + offset, u64::from(value));
        // SAFETY: the verifier sees to it that nothing is written but the packet.
        unsafe { asm!("*(u32 *)({0} + 0) = {1}", in(reg) at, in(reg) value, options(nostack)) };
    }

    /// Reads what begins at `offset`: whole words.
    #[inline(always)]
    pub(crate) fn read<T: Pod>(self, offset: usize, to: &mut T) {
        const { assert!(size_of::<T>().is_multiple_of(4) && align_of::<T>() >= 4) };
        let words = (&raw mut *to).cast::<u32>();
        for word in 0..size_of::<T>() / 4 {
            let value = self.word(offset + 4 * word);
            // SAFETY: within `to`, whose words are aligned, and of which any bytes are a value.
            unsafe { words.wrapping_add(word).write(value) };
        }
    }

    /// Writes what begins at `offset`: whole words.
    #[inline(always)]
    pub(crate) fn write<T: Pod>(self, offset: usize, from: &T) {
        const { assert!(size_of::<T>().is_multiple_of(4) && align_of::<T>() >= 4) };
        let words = (&raw const *from).cast::<u32>();
        for word in 0..size_of::<T>() / 4 {
            // SAFETY: within `from`, whose words are aligned, and all of whose bytes are written.
            let value = unsafe { words.wrapping_add(word).read() };
            self.set_word(offset + 4 * word, value);
        }
    }
}
