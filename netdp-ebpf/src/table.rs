//! The flow table: places for the halves of flows, and the index by which a packet finds them.
//!
//! A lookup takes the set that the key's hash says, looks at its tags, eight at a time, and compares
//! the key of each place whose tag is right; what the set had no room for stands in the one beside it. A
//! lookup waits for nobody. Who adds to a set or takes from
//! it is its only writer meanwhile. What a place says is written before the index leads there, and
//! it is free for the next flow only when the index has ceased to.
//!
//! The first instruction set has an atomic addition that returns nothing (others came with Linux
//! 5.12), so a writer adds 1, looks, and takes it back if it was not the first.

use core::{mem::offset_of, ptr::NonNull};

use netdp_common::{
    addr::{Address, Tuple},
    flow::{BESIDE, Flow, FlowKey, FlowTable, IndexSet, Place, SLOTS_PER_SET, WRITERS, seen, tag},
};

use crate::{
    family::Family,
    flow::{NewFlow, Opened},
    maps::{self, copy_half},
};

/// Looks at the same tag in eight slots before a lookup gives up. An insertion that finds as many
/// refuses.
const SAME_TAGS: usize = 4;
/// How often to try to be a set's only writer. Others are done in less time than a few tries take, or
/// wait for the set beside it; a virtual CPU may sleep meanwhile.
const TRIES: u32 = 1024;
/// How often to try it with the set beside one that is held, where that has the lower number: who comes
/// from there waits for this one, and has more patience.
const TRIES_BELOW: u32 = 64;
/// How often to try that again where a slot would be lost otherwise.
const PATIENCE: u32 = 8;
/// What [`look_up`] returns where there is no such half.
const NOWHERE: u32 = u32::MAX;
/// Slots whose tags are in [`IndexSet::first_tags`].
const FIRST: usize = 8;

/// A half in the table. Its place may be another flow's at any time after a removal: what is
/// written through it must be harmless there.
#[derive(Clone, Copy)]
pub(crate) struct FlowRef<A>(NonNull<Place<A>>);

/// The half that packets of `key` belong to.
#[inline(always)]
pub(crate) fn flow<F: Family>(key: &FlowKey<F::Address>) -> Option<FlowRef<F::Address>> {
    at::<F>(look_up::<F>(key))
}

/// As [`flow`], without a call, and only where it is as easy to find as most are: the verifier would follow
/// all the ways through [`search_set`] once for each place that may be found.
#[inline(always)]
pub(crate) fn flow_at_once<F: Family>(key: &FlowKey<F::Address>) -> Option<FlowRef<F::Address>> {
    let table = F::flow_table()?;
    let hash = key.hash(seed(table));
    let set = F::index_set(hash as u32 & mask(table))?;
    let mut candidates = with_tag(first_tags(set), tag(hash));
    for _ in 0..2 {
        if candidates == 0 {
            return None;
        }
        let place = F::place(place_in(set, lowest(candidates)))?;
        if is_key_of(place, key) {
            return Some(FlowRef(place));
        }
        candidates &= candidates - 1;
    }
    None
}

/// The half in a place.
#[inline(always)]
pub(crate) fn at<F: Family>(place: u32) -> Option<FlowRef<F::Address>> {
    F::place(place).map(FlowRef)
}

/// The half that packets with this tuple belong to which arrive in a zone.
#[inline(always)]
pub(crate) fn flow_of<F: Family>(
    zone: u32,
    tuple: &Tuple<F::Address>,
    proto: u8,
) -> Option<FlowRef<F::Address>> {
    let wanted = F::wanted()?;
    wanted.tuple = *tuple;
    (wanted.zone, wanted.proto, wanted.pad) = (zone as u16, proto, 0);
    at::<F>(F::find())
}

/// The place of a key, or [`NOWHERE`].
#[inline(always)]
fn look_up<F: Family>(key: &FlowKey<F::Address>) -> u32 {
    let Some(wanted) = F::wanted() else { return NOWHERE };
    copy_key(key, wanted);
    F::find()
}

/// The place of the key that lies in [`maps::Maps::wanted`], or [`NOWHERE`].
#[inline(always)]
pub(crate) fn find<F: Family>() -> u32 {
    let Some(key) = F::wanted() else { return NOWHERE };
    spot::<F>(key).and_then(|spot| spot.search::<F>(key)).unwrap_or(NOWHERE)
}

/// The place of a key in a set.
#[inline(always)]
fn search_set<F: Family>(
    set: NonNull<IndexSet>,
    key: &FlowKey<F::Address>,
    tag: u8,
) -> Option<u32> {
    let found = search_tags::<F>(set, key, with_tag(first_tags(set), tag), 0);
    if found != NOWHERE {
        return Some(found);
    }
    let last = last_tags(set);
    if last == 0 {
        return None;
    }
    let found = search_tags::<F>(set, key, with_tag(last.into(), tag), FIRST as u32);
    (found != NOWHERE).then_some(found)
}

#[inline(always)]
fn search_tags<F: Family>(
    set: NonNull<IndexSet>,
    key: &FlowKey<F::Address>,
    mut candidates: u64,
    first: u32,
) -> u32 {
    for _ in 0..SAME_TAGS {
        if candidates == 0 {
            return NOWHERE;
        }
        let slot = lowest(candidates);
        candidates &= candidates - 1;
        let number = place_in(set, first + slot);
        if let Some(place) = F::place(number)
            && is_key_of(place, key)
        {
            return number;
        }
    }
    NOWHERE
}

/// The top bit of each tag that is this one.
#[inline(always)]
fn with_tag(tags: u64, tag: u8) -> u64 {
    zeros(tags ^ u64::from(tag).wrapping_mul(ONES))
}

const ONES: u64 = 0x0101_0101_0101_0101;

/// The top bit of each byte that is 0.
#[inline(always)]
fn zeros(bytes: u64) -> u64 {
    const LOWER: u64 = !(ONES << 7);
    !(((bytes & LOWER) + LOWER) | bytes | LOWER)
}

/// The byte that the lowest bit is in, of a word with nothing but top bits of bytes.
#[inline(always)]
fn lowest(tops: u64) -> u32 {
    let one = (tops & tops.wrapping_neg()) >> 7;
    (one.wrapping_mul(0x0001_0203_0405_0607) >> 56) as u32 & 7
}

#[inline(always)]
fn is_key_of<A: Address>(place: NonNull<Place<A>>, key: &FlowKey<A>) -> bool {
    // SAFETY: the pointer comes from a map lookup; any bytes are a place.
    let its = unsafe { &(*place.as_ptr()).key };
    let differences = its.tuple.xor(key.tuple)
        | u32::from(its.zone ^ key.zone)
        | u32::from(its.proto ^ key.proto);
    differences == 0
}

/// What became of a place that was to be put into the index.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Linked {
    /// Packets find it.
    Now,
    /// The key leads to another place.
    Before,
    /// No slot is free where it belongs.
    NoRoom,
}

/// Where a key belongs in the index.
#[derive(Clone, Copy)]
pub(crate) struct Spot {
    /// Number of the set, its home. What had no room there is in the one beside it.
    set: u32,
    tag: u8,
}

/// The spot of a key.
#[inline(always)]
pub(crate) fn spot<F: Family>(key: &FlowKey<F::Address>) -> Option<Spot> {
    let table = F::flow_table()?;
    let hash = key.hash(seed(table));
    Some(Spot { set: hash as u32 & mask(table), tag: tag(hash) })
}

impl Spot {
    /// Asks for the set, so that it is on its way from memory before it is needed.
    #[inline(always)]
    pub(crate) fn approach<F: Family>(self) {
        if let Some(home) = self.home::<F>() {
            first_tags(home);
        }
    }

    /// Lets packets find a place here. Returns one of [`Linked`].
    #[inline(always)]
    pub(crate) fn link<F: Family>(self, number: u32) -> u32 {
        F::link(number, self.set, self.tag.into())
    }

    /// Makes sure that packets do not find a place here, with patience. Returns one of [`Unlinked`].
    #[inline(always)]
    fn unlink<F: Family>(self, number: u32) -> u32 {
        let mut unlinked = Unlinked::Busy as u32;
        for _ in 0..PATIENCE {
            if unlinked == Unlinked::Busy as u32 {
                unlinked = F::unlink(number, self.set, self.tag.into());
            }
        }
        unlinked
    }

    #[inline(always)]
    fn home<F: Family>(self) -> Option<NonNull<IndexSet>> {
        F::index_set(self.set)
    }

    #[inline(always)]
    fn neighbour<F: Family>(self) -> Option<NonNull<IndexSet>> {
        F::index_set(self.set ^ 1)
    }

    /// The set beside its home, for whoever is the home's only writer, and now is that one's, too.
    #[inline(always)]
    fn begin_beside<F: Family>(self) -> Option<NonNull<IndexSet>> {
        let tries = if self.set & 1 == 0 { TRIES } else { TRIES_BELOW };
        self.neighbour::<F>().filter(|set| begin(writers(*set), tries))
    }

    /// The place of the key whose spot this is.
    #[inline(always)]
    fn search<F: Family>(self, key: &FlowKey<F::Address>) -> Option<u32> {
        let home = self.home::<F>()?;
        if let Some(found) = search_set::<F>(home, key, self.tag) {
            return Some(found);
        }
        if !has_some_beside(home) {
            return None;
        }
        search_set::<F>(self.neighbour::<F>()?, key, self.tag)
    }
}

/// Lets packets find a place by its key, whose spot is this. Returns one of [`Linked`].
#[inline(always)]
pub(crate) fn link<F: Family>(number: u32, set: u32, tag: u8) -> u32 {
    let spot = Spot { set, tag };
    let (Some(place), Some(home)) = (F::place(number), spot.home::<F>()) else {
        return Linked::NoRoom as u32;
    };
    // SAFETY: the pointer comes from a map lookup; any bytes are a place.
    let key = unsafe { &(*place.as_ptr()).key };
    if !begin(writers(home), TRIES) {
        return Linked::NoRoom as u32;
    }
    let linked = if spot.search::<F>(key).is_some() {
        Linked::Before
    } else if put(home, tag, number) || overflow::<F>(spot, home, number) {
        Linked::Now
    } else {
        Linked::NoRoom
    };
    end(writers(home));
    linked as u32
}

/// Puts a place beside its home, which is full, as the home's only writer. Returns whether there was room.
#[inline(always)]
fn overflow<F: Family>(spot: Spot, home: NonNull<IndexSet>, number: u32) -> bool {
    let Some(neighbour) = spot.begin_beside::<F>() else { return false };
    // Before it stands there: who looks for it meanwhile looks there, too.
    maps::add_word(writers(home), BESIDE.into());
    let is_put = put(neighbour, spot.tag, number);
    if !is_put {
        maps::add_word(writers(home), -i64::from(BESIDE));
    }
    end(writers(neighbour));
    is_put
}

/// Puts a place into a free slot, as the set's only writer. Returns whether there was one.
#[inline(always)]
fn put(set: NonNull<IndexSet>, tag: u8, number: u32) -> bool {
    let (first, last) = (first_tags(set), last_tags(set));
    let is_crowded = |tags: u64| with_tag(tags, tag).count_ones() as usize >= SAME_TAGS;
    let holes = zeros(first);
    if holes != 0 && !is_crowded(first) {
        let slot = lowest(holes);
        set_place(set, slot, number);
        set_first_tags(set, first | u64::from(tag) << (8 * slot));
        return true;
    }
    // The other half of the word is no slots.
    let holes = zeros(u64::from(last)) & 0xffff_ffff;
    if holes != 0 && !is_crowded(last.into()) {
        let slot = lowest(holes) & 3;
        set_place(set, FIRST as u32 + slot, number);
        set_last_tags(set, last | u32::from(tag) << (8 * slot));
        return true;
    }
    false
}

/// What became of a place that was to be taken out of the index.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unlinked {
    /// It was not there.
    Before,
    /// This did it.
    Now,
    /// Others write to the set all the time.
    Busy,
}

/// Makes sure that packets with a key whose spot is this do not find this place. Returns one of [`Unlinked`].
#[inline(always)]
pub(crate) fn unlink<F: Family>(number: u32, set: u32, tag: u8) -> u32 {
    let spot = Spot { set, tag };
    let Some(home) = spot.home::<F>() else { return Unlinked::Before as u32 };
    if !begin(writers(home), TRIES) {
        return Unlinked::Busy as u32;
    }
    let unlinked = if take_out(home, number, tag) {
        Unlinked::Now
    } else if has_some_beside(home) {
        take_out_beside::<F>(spot, home, number)
    } else {
        Unlinked::Before
    };
    end(writers(home));
    unlinked as u32
}

/// Takes a place out of the set beside its home, as the home's only writer.
#[inline(always)]
fn take_out_beside<F: Family>(spot: Spot, home: NonNull<IndexSet>, number: u32) -> Unlinked {
    let Some(neighbour) = spot.begin_beside::<F>() else { return Unlinked::Busy };
    let was_there = take_out(neighbour, number, spot.tag);
    end(writers(neighbour));
    if !was_there {
        return Unlinked::Before;
    }
    maps::add_word(writers(home), -i64::from(BESIDE));
    Unlinked::Now
}

#[inline(always)]
fn take_out(set: NonNull<IndexSet>, number: u32, tag: u8) -> bool {
    for slot in 0..SLOTS_PER_SET as u32 {
        if place_in(set, slot) != number {
            continue;
        }
        let (first, last) = (first_tags(set), last_tags(set));
        if slot < FIRST as u32 {
            if (first >> (8 * slot)) as u8 == tag {
                set_first_tags(set, first & !(0xff << (8 * slot)));
                return true;
            }
        } else if (last >> (8 * (slot & 3))) as u8 == tag {
            set_last_tags(set, last & !(0xff << (8 * (slot & 3))));
            return true;
        }
    }
    false
}

/// Writes a new flow into its two places, where nothing leads yet.
#[inline(always)]
pub(crate) fn fill<F: Family>(new: &NewFlow<F>) {
    // Whoever reads all places takes the flow for one when the original half says so.
    let original = 2 * new.number;
    write::<F>(original + 1, &new.reply_key, &new.reply);
    write::<F>(original, &new.key, &new.half);
}

#[inline(always)]
fn write<F: Family>(number: u32, key: &FlowKey<F::Address>, half: &Flow<F::Address>) {
    let Some(place) = F::place(number) else { return };
    // SAFETY: the pointer comes from a map lookup, and the place is nobody else's as yet.
    let place = unsafe { &mut *place.as_ptr() };
    // The key before the half: whoever copies one and finds the key unchanged has copied it whole.
    copy_key(key, &mut place.key);
    copy_half(half, &mut place.half);
    place.number = number;
    // SAFETY: an aligned word, and after all that it is about.
    unsafe { (&raw mut place.is_taken).write_volatile(1) };
}

/// Copies a key from and to a map.
#[inline(always)]
fn copy_key<A: Address>(from: &FlowKey<A>, to: &mut FlowKey<A>) {
    let (from, to): (*const u32, *mut u32) = ((&raw const *from).cast(), (&raw mut *to).cast());
    // Word by word: of a whole assignment the compiler would make a detour over the stack.
    for word in 0..size_of::<FlowKey<A>>() / size_of::<u32>() {
        // SAFETY: a key is a whole number of aligned words.
        let value = unsafe { from.wrapping_add(word).read_volatile() };
        // SAFETY: as above.
        unsafe { to.wrapping_add(word).write_volatile(value) };
    }
}

/// Takes the reply half of a flow out of the index that could not be opened. Returns whether its number
/// may be given back.
#[inline(always)]
pub(crate) fn take_back_reply<F: Family>(new: &NewFlow<F>) -> bool {
    let Some(spot) = spot::<F>(&new.reply_key) else { return false };
    spot.unlink::<F>(2 * new.number + 1) != Unlinked::Busy as u32
}

/// Gives back the number of a flow that the index does not lead to any more, or never did.
#[inline(always)]
pub(crate) fn free<F: Family>(number: u32) {
    for half in [2 * number, 2 * number + 1] {
        if let Some(place) = F::place(half) {
            // SAFETY: the pointer comes from a map lookup; an aligned word.
            unsafe { (*place.as_ptr()).is_taken = 0 };
        }
    }
    F::give_number(&number);
}

/// Takes a number that no flow has; says why not.
#[inline(always)]
pub(crate) fn take_number<F: Family>(number: &mut u32) -> Result<(), Opened> {
    let Some(table) = F::flow_table().filter(|table| mask(*table) != 0) else {
        return Err(Opened::NoRoom);
    };
    if F::take_number(number) {
        return Ok(());
    }
    // None was given back: the next that was never taken.
    let writers = table_word(table, offset_of!(FlowTable, writers));
    if !begin(writers, TRIES) {
        return Err(Opened::NoRoom);
    }
    let top = table_word(table, offset_of!(FlowTable, top));
    // SAFETY: the pointer comes from a map lookup; an aligned word.
    let next = unsafe { top.read_volatile() };
    // SAFETY: as above.
    let is_there = next < unsafe { (*table.as_ptr()).flows };
    if is_there {
        *number = next;
        // SAFETY: as above.
        unsafe { top.write_volatile(next + 1) };
    }
    end(writers);
    if is_there { Ok(()) } else { Err(Opened::Full) }
}

/// Removes both halves of the flow that has a half with this key. Returns its opener's generation if
/// this did it, and `None` where it was gone already.
#[inline(always)]
pub(crate) fn remove<F: Family>(key: &FlowKey<F::Address>) -> Option<u32> {
    let found = look_up::<F>(key);
    let half = at::<F>(found)?;
    let (original, reply) = (found & !1, found | 1);
    let its_spot = spot::<F>(at::<F>(original)?.key())?;
    // The number may have become another flow's. If it does from here on, the spot does not fit.
    if !half.has_key(key) {
        return None;
    }
    // Who takes this one out has the flow to itself, until the number is given back.
    if its_spot.unlink::<F>(original) != Unlinked::Now as u32 {
        return None;
    }
    let opener = at::<F>(original)?.generation();
    let its_spot = spot::<F>(at::<F>(reply)?.key())?;
    // Better a number that is lost than a slot that leads to somebody else's half.
    if its_spot.unlink::<F>(reply) != Unlinked::Busy as u32 {
        free::<F>(found >> 1);
    }
    Some(opener)
}

/// The number of the flow whose turn it is to be looked at.
#[inline(always)]
pub(crate) fn next_in_turn<F: Family>() -> Option<u32> {
    let table = F::flow_table()?;
    let hand = table_word(table, offset_of!(FlowTable, hand));
    // SAFETY: the pointer comes from a map lookup; an aligned word.
    let top = unsafe { table_word(table, offset_of!(FlowTable, top)).read_volatile() };
    // SAFETY: as above.
    let next = unsafe { hand.read_volatile() }.wrapping_add(1);
    let next = if next < top { next } else { 0 };
    // SAFETY: as above. Two CPUs at once look at the same one.
    unsafe { hand.write_volatile(next) };
    (top != 0).then_some(next)
}

/// A word of 32 bits at this offset.
#[inline(always)]
fn table_word(table: NonNull<FlowTable>, offset: usize) -> NonNull<u32> {
    // SAFETY: offsets are those of fields.
    unsafe { table.cast::<u32>().add(offset / size_of::<u32>()) }
}

/// Becomes the only one to write, if it can in so many tries.
#[inline(always)]
fn begin(writers: NonNull<u32>, tries: u32) -> bool {
    for _ in 0..tries {
        // Those who only look don't keep each other from it.
        // SAFETY: the pointer comes from a map lookup; an aligned word.
        if unsafe { writers.as_ptr().read_volatile() } & WRITERS != 0 {
            continue;
        }
        maps::add_word(writers, 1);
        // SAFETY: the pointer comes from a map lookup; an aligned word.
        if unsafe { writers.as_ptr().read_volatile() } & WRITERS == 1 {
            return true;
        }
        maps::add_word(writers, -1);
    }
    false
}

/// Whether keys that belong into this set stand in the one beside it.
#[inline(always)]
fn has_some_beside(set: NonNull<IndexSet>) -> bool {
    // SAFETY: the pointer comes from a map lookup; an aligned word.
    unsafe { writers(set).read_volatile() & !WRITERS != 0 }
}

#[inline(always)]
fn end(writers: NonNull<u32>) {
    maps::add_word(writers, -1);
}

#[inline(always)]
fn seed(table: NonNull<FlowTable>) -> u64 {
    // SAFETY: the pointer comes from a map lookup; an aligned word.
    unsafe { (*table.as_ptr()).seed }
}

#[inline(always)]
fn mask(table: NonNull<FlowTable>) -> u32 {
    // SAFETY: as in `seed`.
    unsafe { (*table.as_ptr()).mask }
}

/// A word of 32 bits at this offset of a set.
#[inline(always)]
fn word(set: NonNull<IndexSet>, offset: usize) -> NonNull<u32> {
    // SAFETY: offsets are those of fields, or of places in the last one.
    unsafe { set.cast::<u32>().add(offset / size_of::<u32>()) }
}

#[inline(always)]
fn writers(set: NonNull<IndexSet>) -> NonNull<u32> {
    word(set, offset_of!(IndexSet, writers))
}

// Tags stand first: a set is found by the pointer to them.
const _: () = assert!(offset_of!(IndexSet, first_tags) == 0);

#[inline(always)]
fn first_tags(set: NonNull<IndexSet>) -> u64 {
    // SAFETY: the pointer comes from a map lookup; an aligned word.
    unsafe { set.cast::<u64>().read_volatile() }
}

#[inline(always)]
fn set_first_tags(set: NonNull<IndexSet>, tags: u64) {
    // SAFETY: as above.
    unsafe { set.cast::<u64>().write_volatile(tags) };
}

#[inline(always)]
fn last_tags(set: NonNull<IndexSet>) -> u32 {
    // SAFETY: as above.
    unsafe { word(set, offset_of!(IndexSet, last_tags)).read_volatile() }
}

#[inline(always)]
fn set_last_tags(set: NonNull<IndexSet>, tags: u32) {
    // SAFETY: as above.
    unsafe { word(set, offset_of!(IndexSet, last_tags)).write_volatile(tags) };
}

/// The word for a slot's place. The verifier wants to know that no slot is beyond the set.
#[inline(always)]
fn place_of(set: NonNull<IndexSet>, slot: u32) -> NonNull<u32> {
    let slot = (slot & 15).min(SLOTS_PER_SET as u32 - 1) as usize;
    word(set, offset_of!(IndexSet, places) + slot * size_of::<u32>())
}

#[inline(always)]
fn place_in(set: NonNull<IndexSet>, slot: u32) -> u32 {
    // SAFETY: as above.
    unsafe { place_of(set, slot).read_volatile() }
}

#[inline(always)]
fn set_place(set: NonNull<IndexSet>, slot: u32, number: u32) {
    // SAFETY: as above.
    unsafe { place_of(set, slot).write_volatile(number) };
}

impl<A: Address> FlowRef<A> {
    /// The key by which it is found.
    #[inline(always)]
    pub(crate) fn key(self) -> &'static FlowKey<A> {
        // SAFETY: the pointer comes from a map lookup; any bytes are a place.
        unsafe { &(*self.0.as_ptr()).key }
    }

    /// Copies the half into a map if it still is this key's. Returns whether it was.
    #[inline(always)]
    pub(crate) fn copy_of(self, key: &FlowKey<A>, copy: &mut Flow<A>) -> bool {
        self.copy_to(copy);
        self.has_key(key)
    }

    /// Whether it is found by this key.
    #[inline(always)]
    pub(crate) fn has_key(self, key: &FlowKey<A>) -> bool {
        is_key_of(self.0, key)
    }

    /// Whether a flow has the place.
    #[inline(always)]
    pub(crate) fn is_taken(self) -> bool {
        // SAFETY: as in `key`; an aligned word.
        unsafe { (*self.0.as_ptr()).is_taken != 0 }
    }

    /// Its own place.
    #[inline(always)]
    pub(crate) fn number(self) -> u32 {
        // SAFETY: as in `key`; an aligned word.
        unsafe { (*self.0.as_ptr()).number }
    }

    /// The other half.
    #[inline(always)]
    pub(crate) fn peer<F: Family<Address = A>>(self) -> Option<Self> {
        at::<F>(self.number() ^ 1)
    }

    /// Copies the half into a map.
    #[inline(always)]
    pub(crate) fn copy_to(self, copy: &mut Flow<A>) {
        // SAFETY: the pointer comes from a map lookup; any bytes are a half.
        copy_half(unsafe { &(*self.0.as_ptr()).half }, copy);
    }

    /// The half where it lies: what is read twice may differ.
    #[inline(always)]
    pub(crate) fn peek(self) -> &'static Flow<A> {
        // SAFETY: as in `copy_to`.
        unsafe { &(*self.0.as_ptr()).half }
    }

    /// See [`Flow::exit`].
    #[inline(always)]
    pub(crate) fn lead_out_of(self, exit: u32) {
        // SAFETY: as in `copy_to`; an aligned word.
        unsafe { (*self.0.as_ptr()).half.exit = exit };
    }

    /// Generation of the container whose packets the half is for.
    #[inline(always)]
    pub(crate) fn generation(self) -> u32 {
        // SAFETY: as in `copy_to`; an aligned word.
        unsafe { (*self.0.as_ptr()).half.generation }
    }

    /// See [`Flow::last_seen`].
    #[inline(always)]
    pub(crate) fn last_seen(self) -> u32 {
        // SAFETY: as in `copy_to`; an aligned word.
        unsafe { (*self.0.as_ptr()).half.last_seen }
    }

    /// Bits of [`seen`].
    #[inline(always)]
    pub(crate) fn seen(self) -> u8 {
        // SAFETY: as in `copy_to`; one byte.
        unsafe { (*self.0.as_ptr()).half.seen }
    }

    /// The acknowledgement number that the direction last sent, if it sent one.
    #[inline(always)]
    pub(crate) fn acknowledged(self) -> Option<u32> {
        // SAFETY: as in `copy_to`; an aligned word.
        (self.seen() & seen::ACK != 0).then(|| unsafe { (*self.0.as_ptr()).half.acknowledged })
    }

    /// Notes a packet. Writes only what is new: an idle cache line stays shared.
    #[inline(always)]
    pub(crate) fn touch(self, half: &Flow<A>, seen: u8, now: u32) {
        if half.last_seen != now {
            // SAFETY: as in `copy_to`; an aligned word.
            unsafe { (*self.0.as_ptr()).half.last_seen = now };
        }
        self.show(half, seen);
    }

    /// Notes the time alone.
    #[inline(always)]
    pub(crate) fn refresh(self, now: u32) {
        // SAFETY: as in `copy_to`; an aligned word.
        unsafe { (*self.0.as_ptr()).half.last_seen = now };
    }

    /// Notes what a packet shows, without refreshing the half.
    #[inline(always)]
    pub(crate) fn show(self, half: &Flow<A>, seen: u8) {
        if half.seen != seen {
            // SAFETY: as in `copy_to`; one byte.
            unsafe { (*self.0.as_ptr()).half.seen = seen };
        }
    }

    /// Notes what the direction acknowledges.
    #[inline(always)]
    pub(crate) fn acknowledge(self, half: &Flow<A>, number: u32) {
        if half.acknowledged != number {
            // SAFETY: as in `copy_to`; an aligned word.
            unsafe { (*self.0.as_ptr()).half.acknowledged = number };
        }
    }

    /// Forgets what was seen but for this, for a new connection between the same ports.
    #[inline(always)]
    pub(crate) fn restart(self, seen: u8, now: u32) {
        // SAFETY: as in `copy_to`; one byte.
        unsafe { (*self.0.as_ptr()).half.seen = seen };
        self.refresh(now);
    }

    /// Notes that the policy of this generation lets the flow pass.
    #[inline(always)]
    pub(crate) fn approve(self, policy_generation: u32) {
        // SAFETY: as in `copy_to`; an aligned word.
        unsafe { (*self.0.as_ptr()).half.policy_generation = policy_generation };
    }
}
