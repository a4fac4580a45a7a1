//! A table of objects at indices that someone else chose: grows by parts of pages, never moves an object.
//!
//! The main thread allocates the indices (it alone knows when a removed object has come back from its worker), the
//! worker only puts, takes and looks up. An object is in two parts, so that what every packet touches lies together and
//! the rest does not come with it into the cache.

use crate::prefetch::{self, Table};

/// Entries that a page has room for: enough that nearly all of it lies on huge pages. Memory that was never used costs
/// nothing.
const PAGE: usize = 1 << 16;

/// Entries that a page grows by.
const STEP: usize = 256;

/// Sparse table of `T` with `R` beside it, indexed by `u32`.
#[derive(Debug)]
pub struct Slab<T, R> {
    pages: Vec<Page<T, R>>,
    len: usize,
}

#[derive(Debug)]
struct Page<T, R> {
    /// With room for a page from the beginning.
    objects: Table<Option<T>>,
    /// The same, on small pages: it is looked at seldom, and a huge one for a few objects would be wasted.
    rests: Vec<Option<R>>,
}

impl<T, R> Page<T, R> {
    fn new() -> Self {
        Self { objects: prefetch::table(PAGE), rests: Vec::with_capacity(PAGE) }
    }

    /// Grows so far that there is a `row`.
    fn reach(&mut self, row: usize) {
        let len = (row + 1).next_multiple_of(STEP).min(PAGE);
        if self.objects.len() < len {
            self.objects.resize_with(len, || None);
            self.rests.resize_with(len, || None);
        }
    }
}

impl<T, R> Default for Slab<T, R> {
    fn default() -> Self {
        Self { pages: Vec::new(), len: 0 }
    }
}

const fn place(index: u32) -> (usize, usize) {
    (index as usize / PAGE, index as usize % PAGE)
}

impl<T, R> Slab<T, R> {
    /// Number of objects.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The object at `index`, without its rest.
    #[inline]
    pub fn get(&self, index: u32) -> Option<&T> {
        let (page, row) = place(index);
        self.pages.get(page)?.objects.get(row)?.as_ref()
    }

    /// Asks for the memory of the object at `index`, without its rest.
    #[inline]
    pub fn prefetch(&self, index: u32) {
        let (page, row) = place(index);
        if let Some(object) = self.pages.get(page).and_then(|page| page.objects.get(row)) {
            prefetch::object(object);
        }
    }

    /// The object at `index`, without its rest.
    #[inline]
    pub fn get_mut(&mut self, index: u32) -> Option<&mut T> {
        let (page, row) = place(index);
        self.pages.get_mut(page)?.objects.get_mut(row)?.as_mut()
    }

    /// The rest of the object at `index`.
    #[inline]
    pub fn rest(&self, index: u32) -> Option<&R> {
        let (page, row) = place(index);
        self.pages.get(page)?.rests.get(row)?.as_ref()
    }

    /// The whole object at `index`.
    #[inline]
    pub fn both_mut(&mut self, index: u32) -> Option<(&mut T, &mut R)> {
        let (page, row) = place(index);
        let Page { objects, rests } = self.pages.get_mut(page)?;
        objects.get_mut(row)?.as_mut().zip(rests.get_mut(row)?.as_mut())
    }

    /// Puts an object at `index`; gives back what was there.
    pub fn put(&mut self, index: u32, object: T, rest: R) -> Option<(T, R)> {
        let (page, row) = place(index);
        while self.pages.len() <= page {
            self.pages.push(Page::new());
        }
        let there = self.pages.get_mut(page)?;
        there.reach(row);
        let Page { objects, rests } = there;
        let old = objects.get_mut(row)?.replace(object).zip(rests.get_mut(row)?.replace(rest));
        self.len += usize::from(old.is_none());
        old
    }

    /// Takes the object at `index` out.
    pub fn take(&mut self, index: u32) -> Option<(T, R)> {
        let (page, row) = place(index);
        let Page { objects, rests } = self.pages.get_mut(page)?;
        let old = objects.get_mut(row)?.take().zip(rests.get_mut(row)?.take());
        self.len -= usize::from(old.is_some());
        old
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn put_take_look_up() {
        let mut slab = Slab::default();
        for index in [0u32, 255, 256, 65_535, 65_536, 70_000] {
            assert_eq!(slab.put(index, index, 'a'), None);
        }
        assert_eq!(slab.put(255, 1, 'b'), Some((255, 'a')));
        assert_eq!(slab.len(), 6);
        assert_eq!((slab.get(255), slab.rest(255)), (Some(&1), Some(&'b')));
        assert_eq!((slab.get(254), slab.rest(254)), (None, None));
        *slab.both_mut(70_000).unwrap().1 = 'c';
        *slab.get_mut(70_000).unwrap() += 1;
        assert_eq!(slab.take(70_000), Some((70_001, 'c')));
        assert_eq!(slab.take(70_000), None);
        assert_eq!(slab.get(1_000_000), None);
        assert_eq!(slab.len(), 5);
    }
}
