//! A table of objects at indices that someone else chose: grows by pages, never moves an object.
//!
//! The main thread allocates the indices (it alone knows when a removed object has come back from its worker), the
//! worker only puts, takes and looks up.

/// Entries of one page. Growing allocates a page, not twice the table.
const PAGE: usize = 256;

/// Sparse table of `T`, indexed by `u32`.
#[derive(Debug)]
pub struct Slab<T> {
    pages: Vec<Box<[Option<T>]>>,
    len: usize,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { pages: Vec::new(), len: 0 }
    }
}

const fn place(index: u32) -> (usize, usize) {
    (index as usize / PAGE, index as usize % PAGE)
}

impl<T> Slab<T> {
    /// Number of objects.
    pub const fn len(&self) -> usize {
        self.len
    }

    /// Whether there is none.
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The object at `index`.
    pub fn get(&self, index: u32) -> Option<&T> {
        let (page, row) = place(index);
        self.pages.get(page)?.get(row)?.as_ref()
    }

    /// The object at `index`.
    pub fn get_mut(&mut self, index: u32) -> Option<&mut T> {
        let (page, row) = place(index);
        self.pages.get_mut(page)?.get_mut(row)?.as_mut()
    }

    /// Puts `value` at `index`; gives back what was there.
    pub fn put(&mut self, index: u32, value: T) -> Option<T> {
        let (page, row) = place(index);
        while self.pages.len() <= page {
            self.pages.push((0..PAGE).map(|_| None).collect());
        }
        let old = self.pages.get_mut(page)?.get_mut(row)?.replace(value);
        self.len += usize::from(old.is_none());
        old
    }

    /// Takes the object at `index` out.
    pub fn take(&mut self, index: u32) -> Option<T> {
        let (page, row) = place(index);
        let old = self.pages.get_mut(page)?.get_mut(row)?.take();
        self.len -= usize::from(old.is_some());
        old
    }

    /// Objects at `from` and above with their indices.
    pub fn iter_from(&self, from: u32) -> impl Iterator<Item = (u32, &T)> {
        let (first, row) = place(from);
        let pages = self.pages.iter().enumerate().skip(first);
        pages
            .flat_map(|(page, rows)| {
                rows.iter().enumerate().map(move |(row, value)| (page * PAGE + row, value))
            })
            .skip(row)
            .filter_map(|(index, value)| Some((u32::try_from(index).ok()?, value.as_ref()?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn put_take_iterate() {
        let mut slab = Slab::default();
        for index in [0u32, 255, 256, 70_000] {
            assert_eq!(slab.put(index, index), None);
        }
        assert_eq!(slab.put(255, 1), Some(255));
        assert_eq!(slab.len(), 4);
        assert_eq!(
            slab.iter_from(255).map(|(i, v)| (i, *v)).collect::<Vec<_>>(),
            [(255, 1), (256, 256), (70_000, 70_000)]
        );
        assert_eq!(slab.take(256), Some(256));
        assert_eq!(slab.take(256), None);
        assert_eq!(slab.get(1_000_000), None);
        assert_eq!(slab.len(), 3);
    }
}
